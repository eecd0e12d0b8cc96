"""Train the reference VLM from nothing: `python -m autotune.reference.train --out DIR`.

Four stages, each resumable from its checkpoint in DIR/checkpoints, each logging one JSON line a report:

1. `vision`   the ViT learns what lies under each patch (we render the scene, so we know), through linear heads.
2. `language` the decoder learns the questions on ideal image tokens: the sum of its own embeddings of the words that
              describe the patch. Needs no pixels, so it runs beside stage 1.
3. `align`    the projector learns to turn ViT features into those sums.
4. `joint`    everything together on pictures, with the patch words as an auxiliary loss.

Questions about one picture share its prefix in one sequence and do not see each other; positions restart after the
image. Shapes: B pictures, Q questions of length L after a prefix of P tokens, N = 256 image tokens, D width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaProcessor

from autotune.reference import scenes
from autotune.reference.architecture import build_model
from autotune.reference.batches import Questions, SharedPrefix, labels_of, pixels_of, questions_of
from autotune.reference.tokenizer import build_processor, word_ids

STAGES = ("vision", "language", "align", "joint")


class Trainer:
    """One stage of the training of one model: batches, loss, optimiser, checkpoint, log."""

    def __init__(self, out: Path, stage: str, steps: int, batch: int, lr: float, device: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.out, self.stage, self.steps, self.batch, self.lr, self.device = out, stage, steps, batch, lr, device
        kept = out / "processor"
        if not kept.exists():
            build_processor().save_pretrained(kept)
        self.processor = LlavaProcessor.from_pretrained(kept)
        self.model = build_model(self.processor).to(device)
        self.words = {
            name: torch.tensor(ids, device=device) for name, ids in word_ids(self.processor.tokenizer).items()
        }
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in scenes.LABELS.items()}).to(
            device
        )
        self.attention = SharedPrefix()
        prefix = self.processor.tokenizer.encode("<s>USER: ", add_special_tokens=False)
        self.prefix_ids = torch.tensor(prefix, device=device)
        self.seed, self.step, self.seconds = seed, 0, 0.0
        self.optimizers = self._optimizers()
        self._load()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        model = self.model.model
        parts: dict[str, list[nn.Module]] = {
            "vision": [model.vision_tower, self.heads],
            "language": [model.language_model],
            "align": [model.multi_modal_projector],
            "joint": [self.model],
        }
        parameters = {id(p): p for part in parts[self.stage] for p in part.parameters() if p.requires_grad}
        embedding = id(self.model.get_input_embeddings().weight)
        matrices = [p for i, p in parameters.items() if p.ndim == 2 and i != embedding and min(p.shape) > 64]
        position = id(model.vision_tower.embeddings.position_embedding.weight)
        matrices = [p for p in matrices if id(p) != position]
        chosen = {id(p) for p in matrices}
        others = [p for i, p in parameters.items() if i not in chosen]
        return [
            torch.optim.Muon(matrices, lr=self.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.lr, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def _load(self) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stage}.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        elif self.stage == "align":
            self._take(folder / "vision.pt", "vision_tower")
            self._take(folder / "language.pt", "language_model")
        elif self.stage == "joint":
            self._take(folder / "align.pt", "")

    def _take(self, path: Path, part: str) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)["model"]
        own = self.model.state_dict()
        own.update({name: value for name, value in state.items() if part in name})
        if part == "language_model":
            own["lm_head.weight"] = state["lm_head.weight"]
        self.model.load_state_dict(own)

    def save(self) -> None:
        path = self.out / "checkpoints" / f"{self.stage}.pt"
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    # Losses -----------------------------------------------------------------------------------------------------

    def features(self, batch: list[scenes.Scene]) -> Tensor:
        """What the ViT says of each patch, (B, N, 128)."""
        outputs = self.model.model.vision_tower(pixels_of(batch).to(self.device), output_hidden_states=True)
        features: Tensor = outputs.hidden_states[-1][:, 1:]
        return features

    def ideal(self, labels: dict[str, Tensor], noise: float) -> Tensor:
        """Sum of the embeddings of the words of each patch, (B, N, D)."""
        embedding = self.model.get_input_embeddings().weight
        total: Tensor | float = 0.0
        for name, ids in self.words.items():
            known = labels[name] >= 0
            total = total + embedding[ids[labels[name].clamp(min=0)]] * known[..., None]
        assert isinstance(total, Tensor)
        return total + noise * total.detach().std() * torch.randn_like(total)

    def patch_loss(self, logits: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy over each group's words; patches with something on them count as much as all the empty ones."""
        total, accuracy = torch.zeros((), device=self.device), {}
        for name, scores in logits.items():
            target = labels[name]
            known = target >= 0
            busy = known & (labels["kind"] > 0)
            parts = (
                [busy, known & ~busy]
                if name == "kind"
                else [busy if name in ("color", "digit", "slot", "order") else known]
            )
            for part in parts:
                total = total + F.cross_entropy(scores[part].float(), target[part]) / len(parts)
            accuracy[name] = (scores[parts[0]].argmax(-1) == target[parts[0]]).float().mean().item()
        return total, accuracy

    def question_loss(self, image_tokens: Tensor, blocks: list[Questions]) -> tuple[Tensor, dict[str, float]]:
        B = len(image_tokens)
        language, embed = self.model.model.language_model, self.model.get_input_embeddings()
        prefix = torch.cat((embed(self.prefix_ids).expand(B, -1, -1).to(image_tokens.dtype), image_tokens), 1)
        P = prefix.shape[1]
        positions = [torch.arange(P)] + [(P + torch.arange(block.length)).repeat(block.num) for block in blocks]
        self.attention.prefix, self.attention.blocks = P, [(block.num, block.length) for block in blocks]
        language.set_attn_implementation("shared_prefix")
        hidden = language(
            inputs_embeds=torch.cat((prefix, *(embed(block.ids_BT.to(self.device)) for block in blocks)), 1),
            position_ids=torch.cat(positions).expand(B, -1).to(self.device),
            attention_mask=torch.zeros(B, 1, 1, 1, device=self.device),  # unused: SharedPrefix knows who sees whom
            use_cache=False,
        ).last_hidden_state[:, P:]
        language.set_attn_implementation("sdpa")
        targets = torch.cat([block.targets_BT for block in blocks], 1).to(self.device)
        asked = targets >= 0
        logits = self.model.lm_head(hidden[asked]).float()
        right = logits.argmax(-1) == targets[asked]
        correct = torch.zeros_like(asked)
        correct[asked] = right
        solved = []
        start = 0
        for block in blocks:
            stop = start + block.num * block.length
            wrong = (asked & ~correct)[:, start:stop].unflatten(1, (block.num, block.length)).any(-1)
            solved.append(1 - wrong.float().mean().item())
            start = stop
        return F.cross_entropy(logits, targets[asked]), {
            "short": solved[0],
            "caption": solved[1],
            "token": right.float().mean().item(),
        }

    def loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = [scenes.sample(rng) for _ in range(self.batch)]
        labels = {name: values.to(self.device) for name, values in labels_of(batch).items()}
        if self.stage == "vision":
            features = self.features(batch)
            return self.patch_loss({name: head(features) for name, head in self.heads.items()}, labels)
        if self.stage == "language":
            asked = questions_of(batch, rng, self.processor.tokenizer, 22, 1)
            return self.question_loss(self.ideal(labels, noise=0.3), asked)
        if self.stage == "align":
            with torch.no_grad():
                features, target = self.features(batch), self.ideal(labels, noise=0.0)
            tokens = self.model.model.multi_modal_projector(features)
            distance = F.mse_loss(tokens.float(), target) / target.var()
            patch, accuracy = self.patch_loss(self._word_scores(tokens), labels)
            return distance + 0.1 * patch, {"distance": distance.item(), **accuracy}
        tokens = self.model.model.multi_modal_projector(self.features(batch))
        patch, accuracy = self.patch_loss(self._word_scores(tokens), labels)
        asked = questions_of(batch, rng, self.processor.tokenizer, 22, 1)
        question, solved = self.question_loss(tokens, asked)
        return question + 0.1 * patch, {**solved, **{f"patch_{k}": v for k, v in accuracy.items()}}

    def _word_scores(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits of each group's words through the decoder's own embedding matrix."""
        embedding = self.model.get_input_embeddings().weight
        return {name: tokens @ embedding[ids].T for name, ids in self.words.items()}

    # The loop ---------------------------------------------------------------------------------------------------

    def run(self, report_every: int = 20, save_every_s: float = 120.0) -> None:
        began, saved, recent = time.monotonic() - self.seconds, time.monotonic(), []
        self.model.train()
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        while self.step < self.steps:
            rng = np.random.default_rng((self.seed, STAGES.index(self.stage), self.step))
            warm, cool = self.step / 50, (self.steps - self.step) / (0.4 * self.steps)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, warm + 0.02, cool)
            with torch.autocast(self.device, torch.bfloat16):
                loss, metrics = self.loss(rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad()
            self.heads.zero_grad()
            recent.append({"loss": loss.item(), **metrics})
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % report_every == 0 or self.step == self.steps:
                self._report(recent)
                recent = []
            if time.monotonic() - saved > save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def _report(self, recent: list[dict[str, float]]) -> None:
        means = {key: round(float(np.nanmean([entry[key] for entry in recent])), 4) for key in recent[0]}
        line = json.dumps({"stage": self.stage, "step": self.step, "seconds": round(self.seconds), **means})
        print(line, flush=True)
        with (self.out / "train.jsonl").open("a") as log:
            log.write(line + "\n")


DEFAULTS = {
    "vision": (1500, 32, 2e-3),
    "language": (1900, 8, 1.5e-3),
    "align": (250, 32, 2e-3),
    "joint": (600, 8, 3e-4),
}
"""Per stage: steps, pictures a step, learning rate."""


def _parse() -> Iterator[tuple[str, argparse.Namespace]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for stage in STAGES if options.stage == "all" else (options.stage,):
        yield stage, options


def _recipe(out: Path) -> list[dict[str, float | str]]:
    """Steps and seconds that each stage took, for the model card."""
    last = {line["stage"]: line for line in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
    return [{name: last[stage][name] for name in ("stage", "step", "seconds")} for stage in STAGES if stage in last]


def main() -> None:
    for stage, options in _parse():
        torch.set_num_threads(options.threads)
        steps, batch, lr = DEFAULTS[stage]
        trainer = Trainer(
            options.out,
            stage,
            options.steps or steps,
            options.batch or batch,
            options.lr or lr,
            options.device,
            options.seed,
        )
        trainer.run()
        if stage == "joint":
            trainer.model.save_pretrained(options.out / "model")
            trainer.processor.save_pretrained(options.out / "model")
            (options.out / "model" / "recipe.json").write_text(json.dumps(_recipe(options.out), indent=1) + "\n")


if __name__ == "__main__":
    main()
