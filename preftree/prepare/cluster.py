"""Work on a Ray cluster: Ray Data streams the items through a pool of actors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from preftree.prepare.workers import Make, R, T


class Cluster:
    """`count` actors of a Ray cluster, each with `gpus` GPUs. `address` is as Ray takes it, or 'local' for a
    cluster of this machine's own that ends with the process. Items and results travel as Python objects."""

    def __init__(self, address: str, count: int, gpus: float = 0) -> None:
        import ray

        self.count, self.gpus = count, gpus
        if not ray.is_initialized():
            cpus = {"num_cpus": count + 1} if address == "local" else {}
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error", **cpus)
        ray.data.DataContext.get_current().enable_progress_bars = False

    def map(self, make: Make[T, R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        """A result comes as soon as its actor has it, so that it can be recorded."""
        import ray

        rows = [{"number": number, "item": _Box(item)} for number, item in enumerate(items)]
        if not rows:
            return
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Actor,
            fn_constructor_args=(make,),
            compute=ray.data.ActorPoolStrategy(size=min(self.count, len(rows))),
            num_gpus=self.gpus or None,
        )
        for row in results.iter_rows():
            yield row["number"], row["result"].content


class _Box:
    """Keeps an item whole: Arrow would turn lists and dicts into its own."""

    def __init__(self, content: Any) -> None:
        self.content = content


class _Actor:
    def __init__(self, make: Make[Any, Any]) -> None:
        self.work = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": _Box(self.work(row["item"].content))}
