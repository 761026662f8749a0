/* Holdfast's hook library, C ABI. Call it from the training loop:
 *
 *   hf_open            once per process            (one process per rank)
 *   hf_register        once: ONE layout document for the job, and this rank's buffers and blobs
 *   hf_restore         once: fills the buffers from the newest safe checkpoint, if there is one
 *                      (hf_restore_partial: some of them)
 *   for each step:
 *     forward, backward
 *     hf_wait_captured           before the optimizer changes tensors
 *     optimizer step
 *     if (hf_due(step)) hf_save  returns in microseconds; the copy runs behind the next step
 *   hf_wait_committed  before leaving, if the last step shall survive
 *   hf_close
 *
 * Promises. No call aborts, throws, or blocks beyond the deadline that it was given; a failure of
 * Holdfast is an error code here and training goes on. Without an agent every call but hf_open
 * returns HF_UNAVAILABLE at once, and works again when the agent is back. (The agent's worker may
 * die and be restarted: calls with a deadline wait for that, within it, for 2 s from the loss if
 * nobody listens, and for 10 s if the agent does. hf_wait_captured needs no agent.) In a forked
 * child (data loaders inherit everything) every call on the job is a harmless
 * HF_FAILED_PRECONDITION; the child may open a job of its own.
 *
 * Errors. Functions return a code; if `error` is not NULL it is filled on failure (what failed, the
 * thing's name, expected and found) and its text is empty on success.
 *
 * Threads. A job is used by one thread at a time, except hf_heartbeat, hf_section_begin and
 * hf_section_end, which any thread may call, as the events for the monitor at the end of this file.
 * The library runs threads of its own.
 *
 * Memory. Strings and arrays given to a call are copied before it returns, with one exception:
 * tensor memory is read until hf_wait_captured says that it was captured, and must not change
 * before.
 *
 * Devices. A buffer may lie in the memory of a CUDA device, managed memory included; the driver
 * that the process has loaded recognises it, and buffers in host and device memory mix freely. What
 * is read is the state behind the work that was on the caller's streams at hf_save; work that is
 * put there afterwards may change tensors as soon as hf_wait_captured has returned. No call but
 * hf_register and hf_restore waits for a device; those wait to their deadline.
 */
#ifndef HOLDFAST_H_
#define HOLDFAST_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HF_API __attribute__((visibility("default")))

#define HF_VERSION_MAJOR 0
#define HF_VERSION_MINOR 1

/* Numbers are those of absl::StatusCode and gRPC. */
typedef enum hf_code {
  HF_OK = 0,
  HF_INVALID_ARGUMENT = 3, /* a value of the caller's is wrong */
  HF_DEADLINE_EXCEEDED = 4,
  HF_NOT_FOUND = 5,      /* hf_restore: there is no checkpoint; start from the beginning */
  HF_ALREADY_EXISTS = 6, /* that step of this attempt is there already */
  HF_PERMISSION_DENIED = 7,
  HF_RESOURCE_EXHAUSTED = 8,  /* no free image memory, no disk space, budget too small */
  HF_FAILED_PRECONDITION = 9, /* order of calls; a forked child; fenced by a newer attempt */
  HF_ABORTED = 10,            /* the image was voided (changed under capture, cancelled) */
  HF_UNIMPLEMENTED = 12,      /* asked for a fault that is not offered */
  HF_INTERNAL = 13,
  HF_UNAVAILABLE = 14, /* no agent now; a retry may help */
  HF_DATA_LOSS = 15    /* stored bytes are wrong; the text names file, tensor and offset */
} hf_code;

typedef struct hf_error {
  hf_code code;
  char text[1020]; /* UTF-8, NUL-terminated, cut if longer */
} hf_error;

typedef struct hf_job hf_job;

/* Deadlines are durations in nanoseconds from the call. */
#define HF_FOREVER INT64_MAX

/* How many ranks capture a tensor that several of them hold. What is written to storage is one copy
 * whatever this says. */
typedef enum hf_copies {
  HF_COPIES_ONCE = 0,     /* one */
  HF_COPIES_PER_NODE = 1, /* one on every node that holds it. One agent is one node: as ONCE */
  HF_COPIES_ALL = 2       /* all of them: the others' copies stay in the agent's memory, and must be
                             equal bit for bit. If they are not, the save fails with HF_DATA_LOSS,
                             which names tensor, element and ranks (docs/OPERATING.md). Costs their
                             size in memory, for each image, and their capture */
} hf_copies;

typedef struct hf_open_options {
  size_t struct_bytes;     /* sizeof(hf_open_options): lets the struct grow */
  const char* job;         /* NULL: $HOLDFAST_JOB. [A-Za-z0-9._-]{1,128}, no leading dot */
  int64_t rank;            /* -1: $RANK */
  int64_t world_size;      /* -1: $WORLD_SIZE */
  int64_t local_rank;      /* -1: $LOCAL_RANK, else 0 */
  const char* attempt_key; /* NULL: $HOLDFAST_ATTEMPT_KEY, else torchrun's run id and restart count,
                              else none */
  const char* root;        /* NULL: $HOLDFAST_ROOT, else the agent's configuration. Directory */
  const char* socket; /* NULL: $HOLDFAST_SOCKET, else the private agent of the job on this node */
  int32_t private_agent; /* -1: $HOLDFAST_PRIVATE (0 or 1), else 1. 1: start one if none listens */
  int32_t check_source;  /* -1: $HOLDFAST_CHECK_SOURCE (none, sample, all), else sample. 0, 1, 2:
                            compare none, a few random chunks or everything with the source once
                            more in hf_wait_captured. A sample misses a change of a fraction f of
                            the bytes with probability (1 - f)^64 at most: 0.1% of 10%, 53% of 1%.
                            With `all` no image is committed before it was compared: if the process
                            dies before that, the image is void. With `sample` an image that was
                            whole when the process died is committed without the comparison */
  int32_t copy_threads;  /* 0: $HOLDFAST_COPY_THREADS, else 1. Threads that capture, 1 to 16 */
  int64_t deadline_ns;   /* 0: 30 s. Of hf_open itself */
  const char* restore_from; /* NULL: $HOLDFAST_RESTORE_FROM, else none; "": none. A checkpoint's
                               directory, or ROOT/JOB for its newest: of any job, root, layout and
                               world size. It is the restore point of a job that has no committed
                               checkpoint of its own on its current branch, and no part of its
                               lineage; a job that has one ignores it (hf_restore_result says so).
                               The same on every rank, or HF_INVALID_ARGUMENT. A relative path is
                               taken from this process's directory. The agent reads it with its
                               own rights, so for its own user only (HF_PERMISSION_DENIED) */
  int32_t copies;           /* -1: $HOLDFAST_COPIES (once, per-node, all), else once. hf_copies; the
                               same on all ranks */
} hf_open_options;

/* All defaults: every field as "not given". */
#define HF_OPEN_OPTIONS_INIT \
  { sizeof(hf_open_options), NULL, -1, -1, -1, NULL, NULL, NULL, -1, -1, 0, 0, NULL, -1 }

/* Joins the job's current attempt, or begins the next one (which fences the older at once). Starts
 * a private agent if none listens and that is allowed. One that listens and takes nobody now (it is
 * ending, or the job's storage is not read yet) is asked again, and the one after it, until the
 * deadline; then HF_UNAVAILABLE with its reason. On failure *job is NULL. */
HF_API hf_code hf_open(const hf_open_options* options, hf_job** job, hf_error* error);

/* Ends this rank's part. Nothing captured is lost: the agent goes on flushing. A capture that is
 * not finished goes on for 10 s at most, then its image is void; a device that does not answer is
 * waited for for 2 s more, then what it may still write to is kept for the rest of the process.
 * NULL is allowed. */
HF_API void hf_close(hf_job* job);

/* A piece of the training process's memory in which the layout places segments of tensors. */
typedef struct hf_buffer {
  const char* name; /* as in the layout document; "<state>/<tensor>" unless it says otherwise */
  void* data;       /* in host or device memory; may be NULL if bytes is 0 */
  uint64_t bytes;
  uint32_t group; /* 0 to 63: hf_wait_captured can wait for one group; captured in this order */
} hf_buffer;

/* Bytes that are not tensors: RNG, scheduler, data loader, arguments. */
typedef enum hf_blob_scope {
  HF_BLOB_GLOBAL = 0, /* one for the job: rank 0's is kept */
  HF_BLOB_RANK = 1    /* one per rank */
} hf_blob_scope;

typedef struct hf_blob_slot {
  const char* name;
  hf_blob_scope scope;
  uint64_t capacity_bytes; /* a larger blob fails that save, by name */
} hf_blob_slot;

/* Registers what will be captured. `layout_json` is the job's layout document
 * (docs/layout-grammar.md), the same text on every rank (hashes are compared; a rank that differs
 * is named). `buffers` are this rank's and must be exactly those in which the layout places
 * something on this rank, with at least the bytes it needs. A second call replaces the
 * registration: for a changed set of tensors; images already captured stay good. Blocks until the
 * agent has made room and plan (deadline_ns). After an error nothing is registered. */
HF_API hf_code hf_register(hf_job* job, const char* layout_json, const hf_buffer* buffers,
                           size_t buffer_count, const hf_blob_slot* blobs, size_t blob_count,
                           int64_t deadline_ns, hf_error* error);

/* 1 if a save is due after this step, else 0. The answer depends on the step and on the agent's
 * configuration when the job was opened, and on a save that the agent wants besides (before the job
 * is stopped, say), which it wants of all ranks at a step that none has come to yet; on nothing
 * else, so all ranks that ask for the same steps get the same answers: also a rank whose agent is
 * away or whose attempt is fenced, where hf_save then says so. */
HF_API int hf_due(hf_job* job, uint64_t step);

typedef struct hf_blob {
  const char* name;
  const void* data;
  uint64_t bytes;
} hf_blob;

typedef struct hf_save_options {
  size_t struct_bytes;
  void* const*
      pointers; /* NULL: those registered. Else one per buffer, in the order of hf_register */
  const hf_blob*
      blobs; /* those of the registered blobs that exist at this step; copied in the call */
  size_t blob_count;
  int64_t wait_ns; /* 0: fail at once if no image memory is free; else wait so long at most */
  /* cudaStream_t or CUstream: of each CUDA context in which buffers lie, the stream behind whose
   * work the tensors are to be captured. NULLs are ignored; a context of which there is none here
   * is represented by its legacy default stream. Looked at only if buffers lie in device memory */
  void* const* streams;
  size_t stream_count;
} hf_save_options;

/* Starts capturing the state after `step`. No allocation, at most two system calls, however many
 * tensors. Errors: HF_RESOURCE_EXHAUSTED (no free image: earlier ones are still flushing),
 * HF_FAILED_PRECONDITION (the last capture has not been waited for; fenced; not registered; a
 * stream is being captured into a CUDA graph), HF_INVALID_ARGUMENT (a blob not registered or too
 * large, named; a stream of a context in which no buffer lies), HF_ALREADY_EXISTS (this attempt has
 * saved this step, or tried to: a save that failed is not repeated, the next step is saved),
 * HF_UNAVAILABLE. */
HF_API hf_code hf_save(hf_job* job, uint64_t step, const hf_save_options* options, hf_error* error);

#define HF_ALL_GROUPS (-1)

/* Waits until the last save's tensors (of one group, or all) have been captured, so that they may
 * change. OK at once if nothing is being captured. Past the deadline the capture is cancelled: the
 * image is void, HF_DEADLINE_EXCEEDED, and the tensors may change all the same; copies that a
 * device has begun are waited for for 1 s at most. HF_ABORTED: a tensor changed under capture
 * (named); the image is void. A device or its driver failed: HF_INTERNAL, with device, tensor and
 * the driver's error; the image is void, earlier ones stay. */
HF_API hf_code hf_wait_captured(hf_job* job, int32_t group, int64_t deadline_ns, hf_error* error);

/* Sets of faults that a commit can survive (DESIGN section 1). */
#define HF_SURVIVE_PROCESS 1u /* any one process dies */
#define HF_SURVIVE_POWER 2u   /* the machine loses power */

/* Waits until the checkpoint of `step` of this attempt is committed surviving at least `faults`. If
 * its capture has not been waited for, does that first.
 * HF_UNIMPLEMENTED at once for a fault that is not offered. The failure of that save (full disk, a
 * rank that did not save, ...) is returned as its error. */
HF_API hf_code hf_wait_committed(hf_job* job, uint64_t step, uint32_t faults, int64_t deadline_ns,
                                 hf_error* error);

typedef enum hf_source {
  HF_SOURCE_NONE = 0,
  HF_SOURCE_MEMORY = 1,
  HF_SOURCE_STORAGE = 2
} hf_source;

/* What became of hf_open_options.restore_from. */
typedef enum hf_restore_from {
  HF_RESTORE_FROM_NOT_GIVEN = 0,
  HF_RESTORE_FROM_USED = 1,   /* it is the restore point */
  HF_RESTORE_FROM_IGNORED = 2 /* the job has a restore point of its own */
} hf_restore_from;

typedef struct hf_restore_result {
  size_t struct_bytes;
  uint64_t step;
  uint32_t attempt;           /* that made the checkpoint */
  uint32_t world_size;        /* of the run that saved it, whose ranks its blobs are of */
  uint64_t bytes;             /* copied into this rank's buffers */
  uint64_t bytes_from_memory; /* of them, from images in the agent's memory */
  int64_t nanoseconds;
  uint64_t tensor_states;          /* of which this rank holds something: filled */
  uint64_t tensor_states_left_out; /* and not chosen by the patterns: left as they were */
  hf_restore_from restore_from;
} hf_restore_result;

/* Fills the registered buffers from the attempt's restore point, which is decided once, the same
 * for every rank: the newest committed checkpoint of the branch. Every block is verified before it
 * reaches a buffer. HF_NOT_FOUND: there is none (buffers untouched): start from step 0. Never if
 * restore_from was given: one that cannot be used is HF_INVALID_ARGUMENT (not there),
 * HF_FAILED_PRECONDITION (not committed, marked bad, or this attempt has saved before it restored),
 * HF_DATA_LOSS (damaged) or whatever kept the agent from reading it. After any other error the
 * buffers' contents are unspecified. */
HF_API hf_code hf_restore(hf_job* job, hf_restore_result* result, int64_t deadline_ns,
                          hf_error* error);

/* Which tensor states a restore fills: those whose tensor's name fits one of `tensors` and whose
 * state's name fits one of `states`; with a count of 0 every name fits. In a pattern `*` stands for
 * any characters and `{NAME}` for a whole number. At most 1000 patterns of at most 4096 bytes. */
typedef struct hf_restore_options {
  size_t struct_bytes;
  const char* const* tensors;
  size_t tensor_count;
  const char* const* states;
  size_t state_count;
  void* const* streams; /* as in hf_save_options: device memory is filled behind their work */
  size_t stream_count;
} hf_restore_options;

/* hf_restore of what `options` choose, on this rank; NULL: of everything. What is left out stays in
 * the buffers as it is, and need not be in the checkpoint; what is chosen must be
 * (HF_FAILED_PRECONDITION, named). Tied tensors share their bytes: one is restored with the other.
 * HF_INVALID_ARGUMENT: a pattern that fits nothing of the layout, on whatever rank, named. Blobs
 * are there as after hf_restore. */
HF_API hf_code hf_restore_partial(hf_job* job, const hf_restore_options* options,
                                  hf_restore_result* result, int64_t deadline_ns, hf_error* error);

/* A blob of the checkpoint that hf_restore read. `rank`: for HF_BLOB_RANK blobs the old rank, or -1
 * for "mine", which is an error on another world size (ask for all old ranks then); for global
 * blobs -1. *data stays valid until the next hf_restore or hf_close. HF_NOT_FOUND if there is none.
 */
HF_API hf_code hf_restored_blob(hf_job* job, const char* name, int64_t rank, const void** data,
                                uint64_t* bytes, hf_error* error);

typedef struct hf_info {
  size_t struct_bytes;
  uint32_t attempt;
  uint32_t fenced;                 /* 1: a newer attempt runs; this one publishes nothing more */
  uint32_t connected;              /* 1: an agent is there now */
  uint32_t reconnect_count;        /* how often the agent's worker had to be found again */
  uint64_t committed_process_step; /* newest of this attempt; UINT64_MAX: none */
  uint64_t committed_power_step;
  uint64_t image_bytes; /* of this rank's file, 0 before hf_register */
  uint64_t block_bytes;
} hf_info;
HF_API hf_code hf_get_info(hf_job* job, hf_info* info);

typedef enum hf_save_state {
  HF_SAVE_NONE = 0,
  HF_SAVE_CAPTURING = 1,
  HF_SAVE_CAPTURED = 2,          /* in the agent's memory, this rank */
  HF_SAVE_COMMITTED_PROCESS = 3, /* all ranks */
  HF_SAVE_COMMITTED_POWER = 4,
  HF_SAVE_FAILED = 5 /* error says why */
} hf_save_state;

typedef struct hf_save_report {
  size_t struct_bytes;
  uint64_t step;
  hf_save_state state;
  uint64_t image_bytes; /* of the file */
  uint64_t blocks;      /* of the image and, with HF_COPIES_ALL, of the extra copies behind it */
  uint64_t blocks_captured; /* by this rank, so far */
  uint64_t blocks_flushed;  /* written to storage, so far; extra copies never are */
  int64_t call_ns;          /* hf_save itself */
  int64_t blocked_ns;       /* in hf_wait_captured */
  int64_t capture_ns;       /* from hf_save to the last block captured; 0 while not yet */
  int64_t flush_ns;         /* from the first block's write to fsync done; 0 while not yet */
  int64_t commit_ns;        /* from hf_save to the commit that survives power; 0 while not yet */
  hf_error error;
  /* Of buffers in device memory; else 0. Bytes per second over the bus: device_bytes / device_ns.
   * What was hidden behind the loop: capture_ns - blocked_ns. */
  uint64_t device_bytes;   /* copied from devices, so far */
  uint64_t unpinned_bytes; /* of them, to memory that the driver had not registered, which is
                              slower: it refused, or the process's limits do */
  int64_t gate_ns;         /* from hf_save until the streams had come to it; 0 while not yet */
  int64_t device_ns;       /* from then to the last of device_bytes */
} hf_save_report;

/* The report of the save of `step`, or of the last save with HF_LAST_STEP. HF_NOT_FOUND if too old.
 */
#define HF_LAST_STEP UINT64_MAX
HF_API hf_code hf_report(hf_job* job, uint64_t step, hf_save_report* report);

/* Liveness for the monitor: stores to shared memory, no system call. A section names what the loop
 * is doing now ("forward", "evaluation"); sections nest up to 8 deep; names are cut at 31 bytes.
 * Both are told to the agent and, if the process has one, shown on the monitor board; with `job`
 * NULL on the board only. */
HF_API void hf_heartbeat(hf_job* job, uint64_t step);
HF_API void hf_section_begin(hf_job* job, const char* name);
HF_API void hf_section_end(hf_job* job);

/* ---- Events for the monitor (docs/MONITOR.md)
 *
 * For communication libraries other than NCCL, which has a plugin: what each connection waits for
 * goes to a board in shared memory that anybody may read in the middle of a hang. Needs no hf_open
 * and no agent. $HOLDFAST_MONITOR = off, light (default) or full.
 *
 * Events have ids. 0 is none: it is returned if the event is not watched (level off, a full table,
 * a forked child) and ignored wherever it is given, as is an id whose event is over. No call
 * blocks, allocates (but the first one, and hf_monitor_communicator), makes a system call (but that
 * one, and hf_monitor_thread) or fails.
 * Any thread may call; the events of one transfer come from one thread at a time. */

typedef enum hf_operation {
  HF_OPERATION_OTHER = 0,
  HF_ALL_REDUCE = 1,
  HF_BROADCAST = 2,
  HF_REDUCE = 3,
  HF_ALL_GATHER = 4,
  HF_REDUCE_SCATTER = 5,
  HF_ALL_TO_ALL = 6,
  HF_GATHER = 7,
  HF_SCATTER = 8,
  HF_SEND = 9,
  HF_RECEIVE = 10,
  HF_BARRIER = 11
} hf_operation;

/* What a step of a transfer waits for, and whom that blames. */
typedef enum hf_wait {
  HF_WAIT_SEND_LOCAL = 3,    /* the local device has not produced the data (this rank) */
  HF_WAIT_SEND_PEER = 4,     /* the receiver has given no credit (the peer) */
  HF_WAIT_SEND_WIRE = 5,     /* sent, not completed (the path) */
  HF_WAIT_RECEIVE_PEER = 6,  /* ready to receive, no data (the peer, or the path) */
  HF_WAIT_RECEIVE_FLUSH = 7, /* data on their way into the device's memory (this node) */
  HF_WAIT_RECEIVE_LOCAL = 8  /* the local device has not consumed the data (this rank) */
} hf_wait;

typedef struct hf_communicator_options {
  size_t struct_bytes;
  uint64_t id;      /* the same on all its ranks, and no other's in the job */
  const char* name; /* for people; NULL: none; cut at 63 bytes */
  uint32_t ranks;
  uint32_t rank;  /* of this process in it */
  uint32_t nodes; /* 0: not known */
} hf_communicator_options;

/* A communicator of this process, until hf_monitor_close. Offers the board to the agent, if one
 * listens, for 200 ms at most. */
HF_API uint64_t hf_monitor_communicator(const hf_communicator_options* options);
HF_API void hf_monitor_close(uint64_t communicator);

/* The calling thread moves the transfers of `communicator`: the agent watches how long it is ready
 * to run and gets no CPU, which tells a starved thread from a slow network. Call it once, from that
 * thread. One system call. */
HF_API void hf_monitor_thread(uint64_t communicator);

/* An operation is enqueued; hf_operation_start: it runs; hf_operation_end: it is done, as far as
 * its transfers are. (Without a start, the first transfer is one.) Operations of a communicator are
 * numbered in the order of begin, which must be the same on all its ranks but for HF_SEND and
 * HF_RECEIVE. `kind`: hf_operation; a number that is none of them counts as HF_OPERATION_OTHER.
 * `root_or_peer`: a rank of the communicator, for the latter two the peer. */
HF_API uint64_t hf_operation_begin(uint64_t communicator, int32_t kind, uint64_t bytes,
                                   uint32_t root_or_peer);
HF_API void hf_operation_start(uint64_t operation);
HF_API void hf_operation_end(uint64_t operation);

/* A part of `operation` (0: not known) over one connection: (channel, peer, direction). `channel`:
 * 0 to 254; `send`: 1 or 0; `steps`: pieces that it is moved in, at most 8 of them open at once. */
HF_API uint64_t hf_transfer_begin(uint64_t communicator, uint64_t operation, uint32_t channel,
                                  uint32_t peer, int send, uint32_t steps);
/* Step `step`, counted from 0, is open: it waits for the local device (send) or the peer (receive)
 * until hf_step_wait says something else. `bytes`: of the step, looked at from HF_WAIT_SEND_WIRE
 * and HF_WAIT_RECEIVE_FLUSH or _LOCAL on. The same state again costs next to nothing. `state`:
 * hf_wait; a number that is none of them changes nothing. */
HF_API uint64_t hf_step_begin(uint64_t transfer, uint32_t step);
HF_API void hf_step_wait(uint64_t step, int32_t state, uint64_t bytes);
HF_API void hf_step_end(uint64_t step);
HF_API void hf_transfer_end(uint64_t transfer);

/* "0.1.0" */
HF_API const char* hf_version(void);

#ifdef __cplusplus
}
#endif

#endif /* HOLDFAST_H_ */
