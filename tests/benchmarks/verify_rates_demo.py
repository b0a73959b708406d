"""`make bench-rates`: verify_rates.py on the demo's simulated Spark, in the image that serves there.

    .venv/bin/python tests/benchmarks/verify_rates_demo.py [arguments of verify_rates.py]

The script and the package go to a folder of the Spark that is removed at the end; a container of the serving image runs
them beside the service, because that image has the `vllm` program.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = "spark-sim"
SSH = ["ssh", "-F", str(ROOT / ".cache" / "sim" / "ssh_config"), HOST]


def read(path: str) -> dict[str, str]:
    """A JSON file of the Spark."""
    done = subprocess.run([*SSH, f"sudo cat {path}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{HOST}:{path} cannot be read ({done.stderr.strip()}): run make demo first")
    data: dict[str, str] = json.loads(done.stdout)
    return data


def main() -> int:
    """Returns what verify_rates.py returns."""
    settings, service = read("/etc/reap/verify.json"), read("/run/reap/service.json")
    model = settings["model_dir"]
    given = ["--endpoint", settings["endpoint"], "--model", settings["model"], "--tokenizer", model, *sys.argv[1:]]
    shown = shlex.join(["python3", "tests/benchmarks/verify_rates.py", *given])
    inside = (
        f"sudo docker run --rm -i --network host --mount type=bind,source=$folder,target=/bench,readonly "
        f"--mount type=bind,source={model},target={model},readonly --workdir /bench --entrypoint python3 "
        f"{service['image']} {shlex.join(['tests/benchmarks/verify_rates.py', *given])}"
    )
    print(f"{HOST}, in {service['image']}:\n$ {shown}", flush=True)
    files = ["tests/benchmarks/verify_rates.py", "plugins/module_utils/reap"]
    pack = ["tar", "-C", str(ROOT), "--exclude=__pycache__", "-c", *files]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packed:
        there = (
            f"folder=$(mktemp -d) && chmod 755 $folder && tar -x -C $folder && {{ {inside} </dev/null; code=$?; "
            "sudo rm -rf $folder; exit $code; }"
        )
        return subprocess.run([*SSH, there], stdin=packed.stdout, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
