"""Checkpoints written while the training continues."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from unloaf.engine.checkpoint.progress import position_text
from unloaf.engine.checkpoint.store import prune_checkpoints, save_checkpoint
from unloaf.engine.run_folder import RunFolder
from unloaf.files.writing import flush, point_to


class Saver:
    """Writes checkpoints in a thread of its own, one at a time; a failure is reported at the next call.

    Args:
        folder: of the run.
        keep: how many checkpoints stay.
        metadata: texts for the header of the weights.
    """

    def __init__(self, folder: RunFolder, *, keep: int, metadata: Mapping[str, str]) -> None:
        self._folder, self._keep, self._metadata = folder, keep, dict(metadata)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, weights: Mapping[str, Any], state: Mapping[str, Any], *, best: bool) -> None:
        """Begins to write; waits for the checkpoint before it."""
        self.wait()
        whole = {**state, "files": self._folder.sizes()}
        self._pending = self._thread.submit(self._write, step, weights, whole, best)

    def check(self) -> None:
        """Raises what the last write raised, if it has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
            CheckpointError: it could not be written; the one before is intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for a write that is under way, and says nothing of its failure: something else ended the run."""
        self._thread.shutdown()

    def _write(self, step: int, weights: Mapping[str, Any], state: Mapping[str, Any], best: bool) -> None:
        for name in state["files"]:
            flush(self._folder.path / name)
        metadata = self._metadata | position_text(state["position"])
        path = save_checkpoint(self._folder.checkpoints, step, weights=weights, state=state, metadata=metadata)
        link = self._folder.path / "model_best"
        if best:
            point_to(link, path)
        protected = [link.resolve()] if link.exists() else []
        prune_checkpoints(self._folder.checkpoints, keep=self._keep, protect=protected, newest=path)
