"""`make bench-rates`: verify_rates.py on the demo's simulated Spark, in the image that serves there.

    .venv/bin/python tests/benchmarks/verify_rates_demo.py [--host NAME] [arguments of verify_rates.py]

The script and the package go to a folder of the Spark that is removed at the end; a container of the serving image runs
them beside the service, because that image has the `vllm` program.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SSH = ["ssh", "-F", str(ROOT / ".cache" / "sim" / "ssh_config")]


def read(host: str, path: str) -> dict[str, str]:
    """A JSON file of the Spark."""
    done = subprocess.run([*SSH, host, f"sudo cat {path}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{host}:{path} cannot be read ({done.stderr.strip()}): run make demo first")
    data: dict[str, str] = json.loads(done.stdout)
    return data


def main() -> int:
    """Returns what verify_rates.py returns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="spark-sim", help="a simulated Spark of this clone")
    args, more = parser.parse_known_args()
    settings, service = read(args.host, "/etc/reap/verify.json"), read(args.host, "/run/reap/service.json")
    model = settings["model_dir"]
    given = ["--endpoint", settings["endpoint"], "--model", settings["model"], "--tokenizer", model, *more]
    shown = shlex.join(["python3", "tests/benchmarks/verify_rates.py", *given])
    inside = (
        f"sudo docker run --rm -i --network host --mount type=bind,source=$folder,target=/bench,readonly "
        f"--mount type=bind,source={model},target={model},readonly --workdir /bench --entrypoint python3 "
        f"{service['image']} {shlex.join(['tests/benchmarks/verify_rates.py', *given])}"
    )
    print(f"{args.host}, in {service['image']}:\n$ {shown}", flush=True)
    files = ["tests/benchmarks/verify_rates.py", "plugins/module_utils/reap"]
    pack = ["tar", "-C", str(ROOT), "--exclude=__pycache__", "-c", *files]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packed:
        there = (
            f"folder=$(mktemp -d) && chmod 755 $folder && tar -x -C $folder && {{ {inside} </dev/null; code=$?; "
            "sudo rm -rf $folder; exit $code; }"
        )
        return subprocess.run([*SSH, args.host, there], stdin=packed.stdout, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
