"""Runs inside the runtime image: feed argument lists to vLLM's own parser.

stdin: JSON {name: [arguments after `vllm serve`]}; stdout, last line: JSON {name: null or what vLLM said}.
"""

import contextlib
import io
import json
import sys


def main() -> None:
    try:  # vLLM 0.27 and later
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    answers = {}
    for name, arguments in json.load(sys.stdin).items():
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                validate_parsed_serve_args(parser.parse_args(arguments))
            answers[name] = None
        except SystemExit:
            lines = said.getvalue().strip().splitlines()
            answers[name] = " ".join(line.strip() for line in lines if not line.startswith("usage"))
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
