"""Plans judged on held-out questions: each against dense, and the tuned and learned ones against every other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from autotune.bench import Bench
from autotune.certify import ScoreTable
from benchmarks.evidence_plans import CALIBRATED, HAND_SET, AtLimit
from btp.presets import SYSTEMS

__all__ = ["Judge"]


class Judge:
    """Scores plans on `certify`, against dense and against each other."""

    def __init__(self, bench: Bench, done: Callable[[str, str], None]) -> None:
        self._bench, self._done = bench, done
        self._table: ScoreTable = bench.table("certify")
        self._rows: list[dict[str, Any]] = []
        self._scores: dict[str, tuple[float, ...]] = {}

    def row(self, name: str, kind: str, at_limit: AtLimit, seed: int | None = None) -> None:
        self._scores[name] = self._bench.scores(at_limit.plan, "certify").scores
        self._rows.append(
            {
                "name": name,
                "title": self._title(name),
                "kind": kind,
                "seed": seed,
                "plan": at_limit.plan.to_dict(),
                "latency": asdict(at_limit.measured),
                "reached": at_limit.reached,
                "rounds": at_limit.rounds,
                **self._judged(self._scores[name]),
                "scores": " ".join(f"{score:.4g}" for score in self._scores[name]),
            }
        )
        self._done("row", f"judged {name}")

    def judged(self) -> dict[str, Any]:
        """The rows, the mean over the tuned plans' seeds, and the tuned and learned plans minus every other."""
        seeds = [row["name"] for row in self._rows if row["kind"] == "tuned"]
        mean = np.mean([self._scores[name] for name in seeds], axis=0)
        ours = {"tuned": mean, **{name: self._scores[name] for name in (*seeds, "learned")}}
        minus = {
            name: {
                row["name"]: asdict(self._table.difference(scores, self._scores[row["name"]]))
                for row in self._rows
                if row["kind"] not in ("tuned", "learned")
            }
            for name, scores in ours.items()
        }
        for row in self._rows:
            row["minus_hand_set"] = asdict(self._table.difference(self._scores[row["name"]], self._scores[HAND_SET]))
        minus["tuned"]["learned"] = asdict(self._table.difference(mean, self._scores["learned"]))
        return {"rows": self._rows, "tuned": self._judged(mean), "minus": minus}

    def _judged(self, scores: Sequence[float]) -> dict[str, Any]:
        """Macro accuracy, its difference to dense, and what became of the tasks."""
        dense = self._scores["dense"]
        task, worst = self._table.worst_task(scores, dense)
        return {
            "macro": asdict(self._table.macro(scores)),
            "minus_dense": asdict(self._table.difference(scores, dense)),
            "worst_task": task,
            "worst": asdict(worst),
            "retention": asdict(self._table.retention(task, scores, dense)),
            "by_task": self._table.by_task(scores),
        }

    @staticmethod
    def _title(name: str) -> str:
        calibrated = f"{SYSTEMS[HAND_SET].name}, calibrated"
        return calibrated if name == CALIBRATED else SYSTEMS[name].name if name in SYSTEMS else name
