"""Measure the data commands on this machine: speed of reformatting, peak memory of reformatting and mixing.

    python entrypoints/data/benchmark_data.py
    python entrypoints/data/benchmark_data.py --sharegpt data/raw/vicuna_sharegpt/FILE.json

Needs no download: without --sharegpt it invents its data. The defaults take some minutes and 5 GB of disk for a while.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data.benchmark import compare_speeds, run_and_measure, write_reformatted, write_sharegpt
from utils.data.formats import SOURCES
from utils.io.errors import run_command
from utils.io.files import write_json

HERE = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sharegpt", type=Path, help="ShareGPT JSON array to time (default: an invented one)")
    parser.add_argument("--speed_mb", type=int, default=100, help="MB of the invented file to time (default: 100)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way; the fastest counts (default: 5)")
    parser.add_argument(
        "--memory_mb", type=int, default=1024, help="MiB of the file for peak memory, 0 to leave it out (default: 1024)"
    )
    parser.add_argument(
        "--mix_rows", type=int, default=1_000_000, help="rows to mix, 0 to leave it out (default: 1000000)"
    )
    parser.add_argument("--work_dir", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--output", type=Path, help="JSON file for the results (default: only printed)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, object] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        folder = Path(name)
        file = arguments.sharegpt
        if file is None:
            file = folder / "speed.json"
            write_sharegpt(file, arguments.speed_mb * 10**6)
        speeds = results["speed"] = compare_speeds(file, folder, arguments.repeats)
        print(f"{file}: {file.stat().st_size / 1e6:.0f} MB")
        ours = speeds["reformat"]
        for way, result in speeds.items():
            print(
                f"  {way:<16}{result['rows_per_second']:>8.0f} rows/s{result['seconds']:>7.2f} s"
                f"{result['cpu_seconds']:>7.2f} s CPU; reformat is {result['seconds'] / ours['seconds']:.1f} times as "
                f"fast, with 1/{result['cpu_seconds'] / ours['cpu_seconds']:.1f} of the CPU time"
            )

        if arguments.memory_mb:
            raw = folder / "raw" / "vicuna_sharegpt" / SOURCES["vicuna_sharegpt"].file
            raw.parent.mkdir(parents=True)
            rows = write_sharegpt(raw, arguments.memory_mb << 20)
            options = ["--raw_data_root", str(folder / "raw"), "--save_path", str(folder / "reformatted")]
            used = results["reformat"] = run_and_measure([sys.executable, str(HERE / "reformat_datasets.py"), *options])
            size = f"{rows} rows, {arguments.memory_mb} MiB"
            print(f"reformat {size}: {used['seconds']:.1f} s, peak {used['peak_mib']:.0f} MiB")
        if arguments.mix_rows:
            write_reformatted(folder / "made" / "data.jsonl", arguments.mix_rows)
            options = ["--reformatted_dir", str(folder), "--save_path", str(folder / "mixed"), "--portions", "made=1"]
            used = results["mix"] = run_and_measure([sys.executable, str(HERE / "mix_datasets.py"), *options])
            print(f"mix {arguments.mix_rows} rows: {used['seconds']:.1f} s, peak {used['peak_mib']:.0f} MiB")
    if arguments.output:
        write_json(arguments.output, results)
        print(f"results: {arguments.output}")
    else:
        print(json.dumps(results))


if __name__ == "__main__":
    run_command(main)
