"""Reads a corpus on a Ray cluster: each worker has the host in memory and reads the shards that Ray assigns to it.

If a worker dies, Ray restarts it and its shard. A shard is written completely or not at all, so that no rows are lost
or duplicated. ``--output`` and ``--input`` must be on a disk that all workers can access.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from modeling_unihyperlora.errors import ConfigError, UniHyperLoraError

from .reading_job import CorpusReader, ReadingJob

try:
    import ray
except ImportError:  # an extra
    ray = None


class ShardReader:
    """Reads shards for ``ray.data.Dataset.map_batches``; each worker has its own host.

    Args:
        job: the reading's settings; the manifest is in the output folder.
    """

    def __init__(self, job: ReadingJob):
        self.reader = CorpusReader(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``id`` (shards,) → ``shard`` and ``words``, (shards,); complete shards are not read again."""
        shards = batch["id"].tolist()
        left = self.reader.to_do(shards)
        words = [self.reader.read_shard(shard) if shard in left else 0 for shard in shards]
        return {"shard": batch["id"], "words": np.array(words, np.int64)}


def read_on_ray(job: ReadingJob, workers: int) -> dict[str, object]:
    """Read a job's missing shards on the cluster that Ray is connected to, or on this machine.

    Args:
        job: the reading's settings.
        workers: number of hosts that read in parallel, with one CPU each, or one GPU each if the cluster has GPUs.

    Returns:
        The output folder, the numbers of all shards and of those read now, their words, and seconds.

    Raises:
        ConfigError: Ray is not installed, or ``workers`` is below 1.
        UniHyperLoraError: a worker raised it.
    """
    if ray is None:
        raise ConfigError("--ray_workers needs Ray, which is not installed: pip install 'unihyperlora[ray]'.")
    if workers < 1:
        raise ConfigError(f"--ray_workers {workers} reads nothing; give 1 or more.")
    absolute = {name: str(Path(getattr(job, name)).absolute()) for name in ("output", "input", "host")}
    there = {name: path for name, path in absolute.items() if name == "output" or Path(path).exists()}
    job = replace(job, **there)  # workers have other working directories
    reader = CorpusReader(job)
    left, shards = reader.to_do(range(reader.manifest.shards)), reader.manifest.shards
    del reader  # the driver's host; each worker has its own
    start, found = time.perf_counter(), []
    if left:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        rows = ray.data.from_items([{"id": shard} for shard in left], override_num_blocks=len(left))
        size = min(workers, len(left))
        read = rows.map_batches(
            ShardReader,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        )
        try:
            found = read.take_all()
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, UniHyperLoraError) else error from None
    return {
        "output": job.output,
        "shards": shards,
        "shards_read": len(left),
        "words_read": int(sum(row["words"] for row in found)),
        "seconds": round(time.perf_counter() - start, 2),
    }
