"""Classify the rows of a JSONL file on a Ray cluster, with one model in each of N actors.

    python examples/ray_job.py reviews.jsonl answers.parquet --actors 2

Needs the extra `ray`. Without a cluster in RAY_ADDRESS Ray starts one on this machine.
"""

from __future__ import annotations

import argparse
import json

import ray

from minilpt.integrations import BatchPredictor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", help="JSONL with a column `text`")
    parser.add_argument("output", help="the folder of Parquet files to make")
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    with open(options.input, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = ray.data.from_items(rows, override_num_blocks=4 * options.actors).map_batches(
        BatchPredictor,
        fn_constructor_kwargs={"outputs": {"label": "predicted", "score": "score"}},
        batch_size=64,
        num_cpus=1,  # each actor loads its model with as many threads
        concurrency=options.actors,
    )
    answers.write_parquet(options.output)


if __name__ == "__main__":
    main()
