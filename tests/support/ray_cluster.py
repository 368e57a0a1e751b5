"""Starts a Ray cluster of two workers on this machine's CPU, for vLLM.

vLLM uses a Ray cluster with GPUs only, because its CPU platform names no device that Ray knows. Here the platform names
GPU, and Ray is told that there are two. All else is as vLLM does it: an actor of Ray for each rank, and gloo between
them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.server import end, free_port, wait_until

# This code runs when a Python process starts, because vLLM's drivers and Ray's workers ask for the device before they
# load any plugin.
_NAMES_A_DEVICE = """
import sys
from importlib.machinery import PathFinder


class NamesADevice:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "vllm.platforms.interface":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_name(module):
            execute(module)
            module.Platform.ray_device_key = "GPU"

        spec.loader.exec_module = execute_and_name
        return spec


sys.meta_path.insert(0, NamesADevice)
"""


@contextmanager
def ray_cluster(folder: Path, *python_path: Path) -> Iterator[dict[str, str]]:
    """Run the cluster until the block ends, and yield the environment variables by which a vLLM server uses it.

    python_path: further folders for PYTHONPATH in all of the cluster's processes.
    """
    (folder / "sitecustomize.py").write_text(_NAMES_A_DEVICE)
    path = [*map(str, (folder, *python_path)), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(path), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    port = free_port()
    # A socket's path may have 107 characters at most, and a test's own folder would leave too few of them.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
        command += ["--num-cpus", "2", "--num-gpus", "2", "--include-dashboard", "false", "--temp-dir", short]
        command += ["--object-store-memory", "100000000", "--disable-usage-stats"]
        # Workers may use any port: by default they use 10002 to 19999, and Ray refuses a cluster whose own port is
        # among them.
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        log_file = folder / "ray.log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )
        try:
            # A driver that asks before the cluster accepts drivers waits five seconds and gives up.
            wait_until(lambda: "Ray runtime started" in log_file.read_text(), process, log_file)
            yield {**settings, "RAY_ADDRESS": f"127.0.0.1:{port}", "VLLM_HOST_IP": "127.0.0.1"}
        finally:
            end(process, seconds=20)
