#!/usr/bin/python3
"""holdfast doctor on this machine as it is, and with everything taken away that can be: what is found is
said, what is missing has its fix, and the exit code says whether something is bad.

Usage: doctor_test.py HOLDFAST HOLDFASTD PLUGIN_DIRECTORY
"""
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile
import unittest

COMMAND, DAEMON, PLUGINS = sys.argv[1:4]
del sys.argv[1:4]

NAMES = ["agent", "boards", "plugin", "level", "proc", "stacks", "kernel_log", "nvml", "ras", "io_uring",
         "memlock", "open_files", "huge_pages", "root"]


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
