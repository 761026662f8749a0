"""holdfast.torch and torch tensors, on one rank. Runs in the virtual environment of
scripts/interop.

Usage: torch_test.py HOLDFASTD        ($HOLDFAST_LIBRARY: the library)
"""
import copy
import sys
import unittest
import warnings

import torch
from torch import distributed, nn

import holdfast.torch
from holdfast import CheckSource, InvalidArgument, memory_of
from holdfast.memory import DTYPES
from holdfast.monitor import Kind
from support import Place, board, communicator, operations

DAEMON = sys.argv.pop(1)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


class Counting(torch.optim.Optimizer):
    """Its state has values that are no tensors."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                parameter.add_(parameter.grad, alpha=-group["lr"] / state["count"])


def parameters(model):
    return list(model.parameters())


OPTIMIZERS = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(
        [{"params": parameters(m)[:2], "lr": 0.1}, {"params": parameters(m)[2:]}], lr=0.01),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9,
                                                   dampening=0.1),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.5),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "Counting": lambda m: Counting(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), t0=2),
}

SCHEDULERS = {
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 5]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9 ** epoch),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
}


class Tied(nn.Module):
    """Two names for one tensor, a parameter that is frozen and one that gets no gradient, a buffer
    that is not persistent."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.head(self.embedding(x) * self.mask)


def new_model():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))


def step_of(model, optimizer, scheduler=None):
    loss = model(torch.randn(5, 6)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


def bits(value):
    """Tensors as bytes, through all that a state_dict nests."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape),
                bytes(value.detach().reshape(-1).view(torch.uint8).tolist()))
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(item) for item in value)
    return value


class TorchMemoryTest(unittest.TestCase):
    def test_tensors_of_every_dtype(self):
        for name, size in DTYPES.items():
            tensor = torch.zeros(3, 2 * size, dtype=torch.uint8).view(getattr(torch, name))
            memory = memory_of(tensor)
            self.assertEqual((memory.address, memory.bytes, memory.dtype, memory.shape),
                             (tensor.data_ptr(), 6 * size, name, (3, 2)))
        self.assertEqual(memory_of(nn.Parameter(torch.zeros(()))).shape, ())
        self.assertEqual(memory_of(torch.zeros(0, 3)).bytes, 0)
        part = torch.zeros(10)[4:]
        self.assertEqual(memory_of(part).address, part.data_ptr())

    def test_what_would_need_a_copy_is_refused_by_name(self):
        for tensor, expected in (
                (torch.zeros(2, 3).t(), "contiguous"), (torch.zeros(6)[::2], "contiguous"),
                (torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last), "contiguous"),
                (torch.zeros(3).expand(2, 3), "contiguous"),
                (torch.zeros(3, device="meta"), "meta"), (torch.zeros(3).to_sparse(), "sparse"),
                (torch.zeros(3, dtype=torch.complex64).conj(), "is_conj"),
                (torch.zeros(3, dtype=torch.complex64).conj().imag, "is_neg")):
            with self.subTest(expected=expected), self.assertRaises(InvalidArgument) as caught:
                memory_of(tensor, "array 'param/w'")
            self.assertIn("'param/w'", str(caught.exception))
            self.assertIn(expected, str(caught.exception))


class TorchCheckpointerTest(unittest.TestCase):
    def setUp(self):
        self.place = Place(self.addCleanup, DAEMON)
        self.place.use()
        torch.manual_seed(1)

    def open(self, model, optimizer=None, **options):
        options = {"job": "test", "on_error": "raise", "save_wait": 30, **options}
        checkpointer = holdfast.torch.Checkpointer(model, optimizer, **options)
        self.addCleanup(checkpointer.close)
        return checkpointer

    def check_resume(self, job, new_optimizer, new_scheduler=lambda optimizer: None):
        """3 steps, a commit, 3 more; against 3 more of another process's objects. Bit for bit."""
        model = new_model()
        optimizer = new_optimizer(model)
        scheduler = new_scheduler(optimizer)
        with self.open(model, optimizer, scheduler=scheduler, job=job) as checkpointer:
            self.assertIsNone(checkpointer.restore())
            for _ in range(3):
                step_of(model, optimizer, scheduler)
            checkpointer.commit(3, state={"samples": 15}, rank_state=b"mine")
        at_commit = bits((model.state_dict(), optimizer.state_dict()))
        for _ in range(3):
            step_of(model, optimizer, scheduler)
        expected = bits((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))

        torch.manual_seed(2)
        model = new_model()
        optimizer = new_optimizer(model)
        scheduler = new_scheduler(optimizer)
        with self.open(model, optimizer, scheduler=scheduler, job=job) as checkpointer:
            resumed = checkpointer.restore()
            self.assertEqual((resumed.step, resumed.state, resumed.rank_state),
                             (3, {"samples": 15}, b"mine"))
            self.assertEqual(checkpointer.rank_state_of(0), b"mine")
            self.assertEqual(bits((model.state_dict(), optimizer.state_dict())), at_commit)
            for _ in range(3):
                step_of(model, optimizer, scheduler)
            self.assertEqual(
                bits((model.state_dict(), optimizer.state_dict(), torch.get_rng_state())), expected)
            checkpointer.commit(6)

    def test_every_optimizer_goes_on_bit_for_bit(self):
        for number, (name, new_optimizer) in enumerate(OPTIMIZERS.items()):
            with self.subTest(optimizer=name):
                self.check_resume(f"optimizer-{number}", new_optimizer)

    def test_every_scheduler_goes_on_bit_for_bit(self):
        for name, new_scheduler in SCHEDULERS.items():
            with self.subTest(scheduler=name), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # LambdaLR says that it does not store its function
                self.check_resume(name, OPTIMIZERS["AdamW"], new_scheduler)

    def test_names_that_share_a_tensor_and_parameters_without_state_go_on(self):
        def train(model, optimizer, count):
            for _ in range(count):
                loss = model(torch.randint(10, (7,))).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        with self.open(model, optimizer) as checkpointer:
            checkpointer.restore()
            train(model, optimizer, 2)
            checkpointer.commit(2)
        at_commit = bits((model.state_dict(), optimizer.state_dict()))
        self.assertEqual(len(optimizer.state_dict()["state"]), 1)
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        with self.open(model, optimizer) as checkpointer:
            self.assertEqual(checkpointer.restore().step, 2)
            self.assertEqual(bits((model.state_dict(), optimizer.state_dict())), at_commit)
            self.assertIs(model.head.weight, model.embedding.weight)

    def test_the_hooks_wait_for_the_capture_before_anything_changes(self):
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters())
        with self.open(model, optimizer, every=1, check_source=CheckSource.ALL) as checkpointer:
            checkpointer.restore()
            for step in range(1, 11):
                step_of(model, optimizer)
                self.assertTrue(checkpointer.after_step(step))
        self.assertEqual(len(self.place.manifests("test")), 10)
        # Without them the comparison finds what changed: the batch statistics, then the weights.
        for hook, changed in ((0, "buffer/1."), (1, "param/")):
            model = new_model()
            optimizer = torch.optim.AdamW(model.parameters())
            checkpointer = self.open(model, optimizer, every=1, job=f"unhooked-{hook}",
                                     check_source=CheckSource.ALL, on_error="log")
            step_of(model, optimizer)
            checkpointer._hooks.pop(hook).remove()
            checkpointer.save(1)
            report = checkpointer.job.report
            while report().blocks_captured < report().blocks:
                pass
            with self.assertLogs("holdfast", "ERROR") as logs:
                step_of(model, optimizer)
                checkpointer.before_update()
            self.assertIn(changed, logs.output[0])
            checkpointer.close()

    def test_after_close_the_model_is_as_before(self):
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters())
        self.open(model, optimizer).close()
        self.assertEqual(len(model._forward_pre_hooks), 0)
        step_of(model, optimizer)

    def test_what_cannot_be_saved_whole_is_refused_by_name(self):
        model = new_model()
        other = nn.Linear(2, 2)
        sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
        for make, expected in (
                (lambda: self.open(model, torch.optim.SGD(other.parameters())), "param_groups[0]"),
                (lambda: self.open(nn.Sequential(model, sharded)), "layout document"),
                (lambda: self.open(nn.Linear(2, 2, device="meta")).save(1), "'param/weight'")):
            with self.subTest(expected=expected), self.assertRaises(InvalidArgument) as caught:
                make()
            self.assertIn(expected, str(caught.exception))
        model = nn.Linear(6, 2)
        optimizer = torch.optim.LBFGS(model.parameters())

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(1, 6)).exp().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # its state has lists of tensors
        with self.assertRaises(InvalidArgument) as caught:
            self.open(model, optimizer).save(1)
        self.assertIn("optimizer.state", str(caught.exception))

    def test_another_model_or_optimizer_is_refused_by_name(self):
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters())
        with self.open(model, optimizer) as checkpointer:
            checkpointer.restore()
            step_of(model, optimizer)
            checkpointer.commit(1)
        renamed = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        wider = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.2), nn.Linear(9, 3))
        for model, groups, expected in ((renamed, None, "'3.weight'"), (wider, None, "0.weight"),
                                        (new_model(), 2, "param_groups")):
            given = ([{"params": parameters(model)[:2]}, {"params": parameters(model)[2:]}]
                     if groups else model.parameters())
            checkpointer = self.open(model, torch.optim.AdamW(given))
            with self.subTest(expected=expected), self.assertRaises(holdfast.Error) as caught:
                checkpointer.restore()
            self.assertIn(expected, str(caught.exception))
            checkpointer.close()

    def test_evaluation_copies_need_no_optimizer(self):
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters())
        with self.open(model, optimizer) as checkpointer:
            step_of(model, optimizer)
            checkpointer.commit(1)
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.data.zero_()
        self.assertEqual(self.open(copied).restore().step, 1)
        self.assertEqual(bits(copied.state_dict()), bits(model.state_dict()))

    def test_the_monitor_is_told_of_what_ddp_communicates_and_the_model_stays_as_it_is(self):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        self.addCleanup(distributed.destroy_process_group)
        data = torch.randn(4, 6)
        found = []
        for is_watched in (False, True):
            torch.manual_seed(1)
            model = nn.parallel.DistributedDataParallel(new_model())
            if is_watched:
                holdfast.torch.watch(model, id=901)
            for _ in range(3):
                torch.manual_seed(2)
                model(data).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()] +
                         [buffer.clone() for buffer in model.buffers()])
        self.assertTrue(all(map(torch.equal, *found)))
        data = board()
        index, (enqueued, started, finished) = communicator(data, 901)
        self.assertEqual((started, finished), (enqueued, enqueued))
        # Before each of three forwards the buffers, behind it at least one bucket of gradients.
        self.assertEqual(operations(data, index, Kind.BROADCAST), 3)
        self.assertEqual(operations(data, index, Kind.ALL_REDUCE), enqueued - 3)
        self.assertGreaterEqual(enqueued, 6)

    def test_a_broadcast_that_fails_is_over_on_the_board(self):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        self.addCleanup(distributed.destroy_process_group)
        model = nn.parallel.DistributedDataParallel(new_model())
        broadcast = model._distributed_broadcast_coalesced
        failures = [None, RuntimeError("connection closed by peer"), None]

        def fails(*arguments):
            failure = failures.pop(0)
            if failure is not None:
                raise failure
            broadcast(*arguments)

        model._distributed_broadcast_coalesced = fails
        holdfast.torch.watch(model, id=903)
        data = torch.randn(4, 6)
        model(data).square().sum().backward()
        with self.assertRaisesRegex(RuntimeError, "connection closed by peer"):
            model(data)
        index, (enqueued, started, finished) = communicator(board(), 903)
        self.assertEqual((started, finished), (enqueued, enqueued))
        self.assertEqual(operations(board(), index, Kind.BROADCAST), 2)
        # The program may go on.
        model(data).square().sum().backward()
        self.assertEqual(failures, [])
        _, (enqueued, started, finished) = communicator(board(), 903)
        self.assertEqual((started, finished), (enqueued, enqueued))
        self.assertEqual(operations(board(), index, Kind.BROADCAST), 3)

    def test_buffers_that_are_not_broadcast_are_no_operation(self):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        self.addCleanup(distributed.destroy_process_group)
        model = nn.parallel.DistributedDataParallel(new_model(), broadcast_buffers=False)
        holdfast.torch.watch(model, id=902)
        model(torch.randn(4, 6)).square().sum().backward()
        data = board()
        index, (enqueued, _, _) = communicator(data, 902)
        self.assertGreaterEqual(enqueued, 1)
        self.assertEqual(operations(data, index, Kind.BROADCAST), 0)


if __name__ == "__main__":
    unittest.main()
