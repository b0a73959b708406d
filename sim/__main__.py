"""Command line of the simulated Spark: `python3 -m sim --help`, from the repository root."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys

from sim import build, hosts, services
from sim import engine as engines
from sim.common import CACHE, FACTS, SimError, as_root, object_name, read_json, run, say, step


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python3 -m sim", description="Simulated Spark hosts on this machine.")
    commands = top.add_subparsers(dest="command", required=True)

    one = commands.add_parser("build", help="make the cached parts that are missing or out of date")
    one.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(build.PARTS)} (default: all)")

    one = commands.add_parser("publish", help="a model of random weights on the hub, new each time, to test downloads")
    one.add_argument("model", metavar="OWNER/NAME")
    one.add_argument("--files", type=int, default=40)
    one.add_argument("--megabytes", type=int, default=4, help="size of each file (default 4)")

    one = commands.add_parser("up", help="a host that answers over SSH")
    one.add_argument("name")
    one.add_argument("--docker", choices=["preinstalled", "absent"], default="preinstalled")
    one.add_argument("--fresh", action="store_true", help="replace a host of this name that is there")
    one.add_argument("--json", action="store_true", help="print what is known of the host")

    one = commands.add_parser("down", help="remove hosts; the last one takes registry, hub and engine with it")
    one.add_argument("names", nargs="*", metavar="NAME")
    one.add_argument("--all", action="store_true", help="everything of this checkout, held or not")

    one = commands.add_parser("status", help="what runs and where")
    one.add_argument("--json", action="store_true")

    one = commands.add_parser("reboot", help="restart a host and wait until it answers")
    one.add_argument("name")
    one.add_argument("--hard", action="store_true", help="as if the power was cut")

    one = commands.add_parser("exec", help="run a command as root on a host, without SSH")
    one.add_argument("name")
    one.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    one = commands.add_parser("service", help="stop or start the registry or the hub, for tests of faults")
    one.add_argument("service", choices=list(services.SERVICES))
    one.add_argument("action", choices=["stop", "start"])
    one.add_argument("--host", help="only as this host sees it")

    commands.add_parser("hold", help="keep engine, registry and hub when the last host goes")
    commands.add_parser("release", help="end the hold")
    commands.add_parser("clean", help="down --all, then remove every cached image, model and setting")
    return top


def status() -> dict[str, object]:
    """Everything `sim status --json` prints."""
    engine = engines.current()
    listed = {
        name: {
            **{key: entry.get(key) for key in ("port", "docker")},
            "running": engine is not None and engine.running(object_name("host", name)),
        }
        for name, entry in hosts.all_entries().items()
    }
    return {
        "engine": {"mode": engine.mode, "command": engine.command} if engine else None,
        "hold": services.HOLD.exists(),
        "hosts": listed,
        "services": services.state(engine),
        "ssh_config": str(hosts.SSH_CONFIG),
        "facts": read_json(FACTS, {}),
    }


def print_status() -> None:
    """The same for people."""
    engine = engines.current()
    mode = {"private": "private, of this checkout", "machine": "this machine's own"}.get(engine.mode if engine else "")
    say(f"engine    {mode or 'not running'}{', held' if services.HOLD.exists() else ''}")
    for name, entry in services.state(engine).items():
        say(f"{name:<9} {entry['url'] if entry['running'] else 'not running'}")
    for name in hosts.all_entries():
        runs = engine is not None and engine.running(object_name("host", name))
        say(f"host      {name}: {f'ssh -F {hosts.SSH_CONFIG} {name}' if runs else 'not running'}")
    if CACHE.exists():
        say(f"cache     {engines.disk_use(CACHE):.1f} GiB under {CACHE}")


def clean() -> None:
    """Removes everything: what runs and what is cached."""
    engine = engines.current() or (engines.ensure() if (CACHE / "engine.json").exists() and _machine_mode() else None)
    hosts.down_all()
    if engine is not None and engine.mode == "machine":
        images = engine.ours(what="image")
        if images:
            engine.docker("rmi", "--force", *images, check=False)
    if CACHE.exists():
        with step(f"removing {CACHE}"):
            try:
                shutil.rmtree(CACHE)
            except PermissionError:
                run(as_root(["rm", "-rf", "--one-file-system", CACHE]))


def _machine_mode() -> bool:
    return bool(read_json(CACHE / "engine.json", {}).get("mode") == "machine")


def check_owner() -> None:
    """Refuses where another user made the cache: its files or the engine's socket would be closed to one of the two."""
    if CACHE.exists() and CACHE.stat().st_uid != os.geteuid():
        owner = CACHE.owner()
        raise SimError(f"{CACHE} belongs to {owner}, this is user {os.geteuid()}: run as {owner}, or remove it")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0 done, 1 failed, 2 wrong use (and, for `exec`, the command's own)."""
    # An end by signal clears up like Ctrl-C, also where the shell started us in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    top = parser()
    options = top.parse_args(arguments)
    try:
        check_owner()
        if options.command == "build":
            build.build(options.parts)
        elif options.command == "publish":
            print(build.publish(options.model, options.files, options.megabytes))
        elif options.command == "up":
            entry = hosts.up(options.name, options.docker, options.fresh)
            if options.json:
                print(json.dumps({**entry, "ssh_config": str(hosts.SSH_CONFIG), "user": hosts.USER}, indent=2))
        elif options.command == "down":
            if bool(options.names) == options.all:
                top.error("down wants host names, or --all")
            hosts.down_all() if options.all else hosts.down(options.names)
        elif options.command == "status":
            if options.json:
                print(json.dumps(status(), indent=2))
            else:
                print_status()
        elif options.command == "reboot":
            hosts.reboot(options.name, options.hard)
        elif options.command == "exec":
            words = options.words[1:] if options.words[:1] == ["--"] else options.words
            if not words:
                top.error("exec wants a command: python3 -m sim exec NAME -- COMMAND")
            return hosts.execute(options.name, words)
        elif options.command == "service":
            services.control(options.service, options.action, options.host)
        elif options.command == "hold":
            services.HOLD.parent.mkdir(parents=True, exist_ok=True)
            services.HOLD.touch()
        elif options.command == "release":
            services.HOLD.unlink(missing_ok=True)
            services.release()
        elif options.command == "clean":
            clean()
    except SimError as error:
        say(f"sim: error: {error}")
        return 1
    except KeyboardInterrupt:
        say("sim: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
