"""The flag that shuts the door of the model's server, in the release nearest to the validated image."""

from __future__ import annotations

from tests.published import fetch

ARGUMENTS, SERVER = "vllm/entrypoints/openai/cli_args.py", "vllm/entrypoints/openai/api_server.py"


def test_vllm_0_22_takes_a_middleware_class_and_puts_it_outermost() -> None:
    folder = fetch("vllm", "0.22.0", [ARGUMENTS, SERVER])
    assert "\n    middleware: list[str] = " in (folder / ARGUMENTS).read_text()
    server = (folder / SERVER).read_text()
    # What is added last is asked first.
    last = server.rindex("app.add_middleware(")
    assert "for middleware in args.middleware:" in server[:last]
    assert "app.add_middleware(imported)" in server[last:]
