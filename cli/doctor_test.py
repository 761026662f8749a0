#!/usr/bin/python3
"""holdfast doctor on this machine as it is, and with everything taken away that can be: what is found is
said, what is missing has its fix, and the exit code says whether something is bad.

Usage: doctor_test.py HOLDFAST HOLDFASTD PLUGIN_DIRECTORY FAKE_CUDA_DIRECTORY
"""
import ctypes
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile
import unittest

COMMAND, DAEMON, PLUGINS, FAKE_CUDA = sys.argv[1:5]
del sys.argv[1:5]

NAMES = ["agent", "boards", "plugin", "level", "proc", "stacks", "kernel_log", "nvml", "cuda", "ras",
         "io_uring", "memlock", "open_files", "huge_pages", "root"]


class Doctor(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.place = pathlib.Path(self.temporary.name)
        # A port that nobody has.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.ras = f"127.0.0.1:{probe.getsockname()[1]}"

    def run_doctor(self, *arguments, preexec=None, **variables):
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("HOLDFAST", "NCCL", "LD_LIBRARY_PATH"))}
        environment.update(HOLDFAST_SOCKET=str(self.place / "agent.sock"), NCCL_RAS_ADDR=self.ras,
                           LD_LIBRARY_PATH=PLUGINS,
                           # holdfast-witness stands beside the agent.
                           PATH=f"{os.path.dirname(DAEMON)}:{os.environ['PATH']}")
        environment.update(variables)
        return subprocess.run([COMMAND, "doctor", *arguments], env=environment, capture_output=True,
                              text=True, timeout=60, preexec_fn=preexec)

    def checks(self, *arguments, code=None, **options):
        result = self.run_doctor("--json", *arguments, **options)
        self.assertEqual(result.stderr, "")
        report = json.loads(result.stdout)
        self.assertEqual(report["schema_version"], 1)
        self.assertEqual([check["name"] for check in report["checks"]], NAMES)
        for check in report["checks"]:
            self.assertTrue(check["found"], check)
        bad = any(check["health"] == "bad" for check in report["checks"])
        self.assertEqual(result.returncode, 1 if bad else 0)
        if code is not None:
            self.assertEqual(result.returncode, code, result.stdout)
        return {check["name"]: check for check in report["checks"]}

    def test_without_an_agent_and_a_job_nothing_is_bad(self):
        checks = self.checks(NCCL_PROFILER_PLUGIN="holdfast")
        self.assertEqual(checks["agent"]["health"], "absent")
        self.assertIn("holdfastd --socket", checks["agent"]["fix"])
        self.assertEqual(checks["plugin"]["health"], "good")
        self.assertEqual(checks["ras"]["health"], "absent")
        self.assertEqual(checks["root"]["health"], "absent")
        self.assertEqual(checks["level"]["health"], "good")
        self.assertIn(checks["stacks"]["health"], ("good", "limited"))
        if os.geteuid() == 0 and checks["stacks"]["health"] != "good":
            print(f"no stacks here: {checks['stacks']['found']}")

    def test_an_agent_is_found_with_its_version_boards_and_root(self):
        root = self.place / "root"
        root.mkdir()
        path = str(self.place / "agent.sock")
        agent = subprocess.Popen(
            [DAEMON, "--socket", path, "--root", str(root)], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HOLDFAST_STATE_DIRECTORY": str(self.place / "state")})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.stderr.close)
        self.addCleanup(agent.terminate)
        for line in agent.stderr:
            if "serving" in line:
                break
        checks = self.checks(NCCL_PROFILER_PLUGIN="holdfast", code=0)
        self.assertEqual(checks["agent"]["health"], "good")
        self.assertIn("version", checks["agent"]["found"])
        self.assertEqual(checks["boards"]["health"], "absent")
        self.assertIn("NCCL_PROFILER_PLUGIN", checks["boards"]["fix"])
        self.assertEqual(checks["root"], {"name": "root", "health": "good",
                                          "found": f"{root} is writable", "fix": ""})
        # The agent's limits, not those of whoever asks.
        less = self.checks(preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
        for name in ("memlock", "open_files"):
            self.assertIn("(the agent's)", checks[name]["found"])
            self.assertEqual(less[name], checks[name])

    def test_a_plugin_that_is_not_found_is_bad(self):
        checks = self.checks(LD_LIBRARY_PATH="", code=1)
        self.assertEqual(checks["plugin"]["health"], "bad")
        self.assertIn("LD_LIBRARY_PATH", checks["plugin"]["fix"])
        # One that is found and not asked for is a hint.
        checks = self.checks()
        self.assertEqual(checks["plugin"]["health"], "limited")
        self.assertIn("NCCL_PROFILER_PLUGIN=holdfast", checks["plugin"]["fix"])
        # A library that is no plugin.
        checks = self.checks(NCCL_PROFILER_PLUGIN="/lib/x86_64-linux-gnu/libc.so.6", code=1)
        self.assertEqual(checks["plugin"]["health"], "bad")

    def test_what_is_missing_has_its_fix(self):
        checks = self.checks(
            "--kernel-log", str(self.place / "none"), HOLDFAST_MONITOR="off",
            HOLDFAST_ROOT=str(self.place / "nothing"), code=1,
            preexec=lambda: (resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
                             resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))))
        self.assertEqual(checks["root"]["health"], "bad")
        self.assertEqual(checks["root"]["fix"], f"mkdir -p {self.place / 'nothing'}")
        for name, fix in (("kernel_log", "/dev/kmsg"), ("level", "unset HOLDFAST_MONITOR"),
                          ("open_files", "LimitNOFILE"), ("memlock", "LimitMEMLOCK")):
            self.assertEqual(checks[name]["health"], "limited", name)
            self.assertIn(fix, checks[name]["fix"])
        self.assertIn("light", self.checks(HOLDFAST_MONITOR="loud")["level"]["found"])

    def cuda(self, mode="", **options):
        return self.checks(LD_LIBRARY_PATH=f"{PLUGINS}:{FAKE_CUDA}", HOLDFAST_FAKE_CUDA=mode, **options)["cuda"]

    def test_what_a_cuda_driver_grants_is_said(self):
        self.assertEqual(self.cuda(), {
            "name": "cuda", "health": "good", "fix": "",
            "found": "CUDA 13.0; 2 devices (fake, fake); each registers host memory"})
        absent = self.cuda("absent")
        self.assertEqual((absent["health"], absent["fix"]), ("absent", ""))
        self.assertIn("cuInit: CUDA_ERROR_NO_DEVICE (100)", absent["found"])
        limited = self.cuda("pinless")
        self.assertEqual(limited["health"], "limited")
        for device in "01":
            self.assertIn(f"device {device} registers no host memory, so that captures are slower: "
                          "cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)", limited["found"])
        self.assertIn("ulimit -l unlimited", limited["fix"])

    def test_a_cuda_driver_that_does_not_work_is_bad(self):
        bad = self.cuda("mismatch", code=1)
        self.assertEqual((bad["health"], bad["fix"]), ("bad", "nvidia-smi, which says more"))
        self.assertIn("cuInit: CUDA_ERROR_OF_THE_FAKE (803)", bad["found"])

    def test_no_cuda_driver_is_no_fault(self):
        try:
            ctypes.CDLL("libcuda.so.1")
            self.skipTest("there is an NVIDIA driver here: 1 skipped")
        except OSError:
            pass
        self.assertEqual(self.checks()["cuda"], {
            "name": "cuda", "health": "absent", "fix": "",
            "found": "no CUDA driver: libcuda.so.1: cannot open shared object file: No such file or "
                     "directory"})

    def test_a_port_of_somebody_else_is_said(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            checks = self.checks(NCCL_RAS_ADDR=address)  # it accepts, and says nothing
            self.assertEqual(checks["ras"]["health"], "limited")
            self.assertIn("no answer in time", checks["ras"]["found"])
        checks = self.checks("--ras", "nowhere", code=1)
        self.assertEqual(checks["ras"]["health"], "bad")

    def test_people_get_a_line_a_check_and_its_fix(self):
        result = self.run_doctor(NCCL_PROFILER_PLUGIN="holdfast")
        self.assertIn(result.returncode, (0, 1))
        for name in NAMES:
            self.assertRegex(result.stdout, rf"(?m)^(good|absent|limited|bad) +{name} ")
        self.assertIn("-> holdfastd --socket", result.stdout)


if __name__ == "__main__":
    unittest.main()
