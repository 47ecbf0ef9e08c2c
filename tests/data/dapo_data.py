"""Files in the layout of DAPO-Math-17k, of any size; ``python tests/dapo_data.py 17917 100`` measures loading one.

The published file holds 17,917 rows 100 times, shuffled; 519 of them share their prompt with another index.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dapo_async.config.settings import Data
from dapo_async.data.prompts import PromptSet, load_prompts
from tests.data.test_prompts import CHAT_TOKENIZER, DAPO_SCHEMA, dapo_row

TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
SHARED = 519 / 17917  # rows whose prompt another row has, too


def write_dapo_file(path: Path, num_rows: int, copies: int, conflicts: int = 0) -> Path:
    """``num_rows`` rows, ``copies`` times, each time in another order; ``conflicts`` shared prompts have two truths."""
    distinct = num_rows - int(SHARED * num_rows)
    rows = []
    for number in range(num_rows):
        problem, second = number % distinct, number >= distinct
        steps = " and ".join(f"$x_{{{k}}} = {problem * k % 97}$" for k in range(6))
        text = TEMPLATE.format(f"Problem {problem}: let {steps}. Find their sum.")
        truth = problem + (second and problem < conflicts)
        rows.append(dapo_row(text, str(truth), f"{number:08d}-uuid"))
    table = pa.Table.from_pylist(rows, DAPO_SCHEMA)
    orders = np.random.default_rng(0)
    with pq.ParquetWriter(path, DAPO_SCHEMA) as writer:
        for _ in range(copies):
            writer.write_table(table.take(pa.array(orders.permutation(num_rows))))
    return path


def load_dapo_file(path: Path) -> PromptSet:
    return load_prompts(path, CHAT_TOKENIZER, Data(train=str(path), max_prompt_tokens=2048))


def main() -> None:
    num_rows, copies = (int(argument) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = write_dapo_file(Path(folder) / "dapo.parquet", num_rows, copies)
        started = time.monotonic()
        prompts = load_dapo_file(path)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{prompts.counts.rows} rows, {len(prompts)} prompts: {seconds:.1f} s, peak {peak} MiB")


if __name__ == "__main__":
    main()
