"""The published systems as plans, scaled to a model's depth. Standard library only.

Layers are 0-based and given for the decoder the source ran, 32 layers of LLaVA-1.5-7B where nothing else is said. The
scaling rule: a reference layer r of 32 becomes round_half_up(r * num_layers / 32); where two stages would meet, the
later one moves down by one layer, and where they would run past the end they move up, so that layers always rise and
lie inside the model.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from btp.errors import PlanError
from btp.plan import Plan, Stage, round_half_up

__all__ = [
    "SYSTEMS",
    "System",
    "btp_paper",
    "btp_released",
    "cdpruner",
    "dart",
    "dense",
    "divprune",
    "fastv",
    "pyramiddrop",
    "random_control",
    "scale_layers",
    "todre",
    "uniform_control",
    "vtw",
    "with_selector",
]

_REFERENCE_DEPTH = 32
_QWEN_DEPTH = 28
_OVERSAMPLE = (3.7, 1.5, 1.2)  # BTP's k'/k by stage, in its code, where k is the share chosen by attention
_CANDIDATES = (3.7 * 0.3, 1.5 * 0.9, 1.2)  # LLaVA's candidates by what the stage keeps in all


def scale_layers(layers: Sequence[int], num_layers: int, *, reference_depth: int = _REFERENCE_DEPTH) -> tuple[int, ...]:
    """Reference layers of a decoder of `reference_depth`, for one of `num_layers` (rule at the top of the file).

    Raises PlanError where there are more layers asked for than the model has.
    """
    if num_layers < len(layers):
        raise PlanError(f"{len(layers)} stages need as many decoder layers, got {num_layers}; use fewer stages")
    scaled: list[int] = []
    for layer in layers:
        at_least = scaled[-1] + 1 if scaled else 0
        scaled.append(max(at_least, round_half_up(layer * num_layers / reference_depth)))
    return tuple(min(layer, num_layers - len(scaled) + index) for index, layer in enumerate(scaled))


def dense(num_layers: int) -> Plan:
    """The model as it is: no stages."""
    return Plan(stages=())


def btp_paper(
    num_layers: int,
    *,
    layers: Sequence[int] | None = None,
    family: Literal["llava-1.5", "llava-1.6", "qwen2.5-vl"] = "llava-1.5",
) -> Plan:
    """Balanced Token Pruning as the paper states it (arXiv 2505.22038): its objective, half kept a stage.

    layers: the stage layers. The paper finds them on 64 samples and prints none: pass what
    `btp.calibration.stage_layers` found. Until then they are its code's, 3, 6, 14 of 32 (Qwen2.5-VL: 3, 6, 15, 22 of
    28), scaled. Lambda is the paper's by family and stage. Oversampling and the grid seeds, half of what the first
    stage keeps (144 of 288), are its code's: there the candidates are 3.7, 1.5 and 1.2 times the tokens chosen by
    attention, which are .3, .9 and all of a stage's, so 1.11, 1.35 and 1.2 times what the stage keeps. For Qwen2.5-VL
    the paper has four lambdas and ends at 25 % and 12.5 %; halving backwards gives 50 % before these, and 75 % for the
    first stage is our choice. Its code's candidates, .37, .6 and 1.2 times what the stage keeps, are fewer than are
    kept in two stages of three, so there positions are not re-balanced: 1.0, 1.0, 1.0 and 1.2. How the objective is
    maximised is ours too: see the selector `joint`.
    Raises PlanError for an unknown family and for another number of layers than the family has stages.
    """
    weights = {
        "llava-1.5": (0.6, 0.8, 1.0),
        "llava-1.6": (0.4, 0.7, 1.0),
        "qwen2.5-vl": (0.2, 0.5, 0.8, 1.0),
    }
    _check_family(family, weights)
    qwen = family == "qwen2.5-vl"
    if layers is None:
        reference = ((3, 6, 15, 22), _QWEN_DEPTH) if qwen else ((3, 6, 14), _REFERENCE_DEPTH)
        layers = scale_layers(reference[0], num_layers, reference_depth=reference[1])
    keep = (3 / 4, 1 / 2, 1 / 4, 1 / 8) if qwen else (1 / 2, 1 / 4, 1 / 8)
    oversample = (1.0, 1.0, 1.0, 1.2) if qwen else _CANDIDATES
    stages = _stages("joint", layers, keep, weights[family], oversample)
    return Plan(stages=(replace(stages[0], seeds=0.5), *stages[1:]))


def btp_released(
    num_layers: int,
    *,
    layers: Sequence[int] | None = None,
    keep: Sequence[float] | None = None,
    attention_weights: Sequence[float] | None = None,
    oversample: Sequence[float] | None = None,
    drop_last: bool = False,
    family: Literal["llava-1.5", "qwen2.5-vl"] = "llava-1.5",
) -> Plan:
    """Balanced Token Pruning with the values and the count split of its released code (arXiv 2505.22038).

    Source: github.com/EmbodiedCity/NeurIPS2025-Balanced-Token-Pruning. LLaVA-1.5: before 3, 6, 14 of 32 keep 288,
    144, 48 of 576, count split .3, .9, 1.0, ranked by the head mean of raw logits. Qwen2.5-VL: before 3, 6, 15 of 28
    keep 1/2, 1/4, 1/8, split .1, .4, 1.0, ranked by that of softmax. Oversampling 3.7, 1.5, 1.2 in both.
    layers: the stage layers, such as `btp.calibration.stage_layers` found them; by default those above, scaled.
    drop_last: drop every image token before layer 22 (of 32 and of 28), as the code does. Off by default, where we
    differ: it is cheap on yes/no questions and ruins reading.
    Raises PlanError where layers, keep, attention_weights and oversample are not of one length.
    """
    _check_family(family, ("llava-1.5", "qwen2.5-vl"))
    qwen = family == "qwen2.5-vl"
    if keep is None:
        keep = (1 / 2, 1 / 4, 1 / 8) if qwen else (1 / 2, 1 / 4, 1 / 12)
    if attention_weights is None:
        attention_weights = (0.1, 0.4, 1.0) if qwen else (0.3, 0.9, 1.0)
    oversample = _OVERSAMPLE if oversample is None else oversample
    reference = (3, 6, 15 if qwen else 14, *((22,) if drop_last else ()))
    scaled = scale_layers(reference, num_layers, reference_depth=_QWEN_DEPTH if qwen else _REFERENCE_DEPTH)
    if layers is None and len(keep) != 3:
        raise PlanError(f"the reference schedule has 3 stages, got {len(keep)} keep values; pass layers as well")
    layers = scaled[:3] if layers is None else layers
    stages = _stages("balanced", layers, keep, attention_weights, oversample)
    if not qwen:
        stages = [replace(stage, attention="logits") for stage in stages]
    if drop_last:
        stages.append(Stage(layer=max(scaled[-1], stages[-1].layer + 1), keep=0.0))
    return Plan(stages=tuple(stages))


def fastv(num_layers: int, *, layer: int | None = None, keep: float = 0.5) -> Plan:
    """FastV (ECCV 2024, arXiv 2403.06764): one cut by last-token attention, before layer 2 of 32.

    Source: github.com/pkunlp-icler/FastV. We differ in whose attention it is: the code takes that of the layer before
    the cut, we that of the layer after it.
    """
    layer = scale_layers((2,), num_layers)[0] if layer is None else layer
    return Plan(stages=(Stage(layer=layer, keep=keep, selector="attention"),))


def vtw(num_layers: int, *, layer: int | None = None) -> Plan:
    """Visual Tokens Withdrawal (AAAI 2025, arXiv 2405.05803): drop every image token before layer 15 of 32.

    Source: github.com/lzhxmu/VTW, which finds the layer by the KL divergence of the last token's logits to dense, on
    20 samples; layer 15 is what it found for LLaVA-1.5-7B.
    """
    layer = scale_layers((15,), num_layers)[0] if layer is None else layer
    return Plan(stages=(Stage(layer=layer, keep=0.0),))


def pyramiddrop(num_layers: int) -> Plan:
    """PyramidDrop (CVPR 2025, arXiv 2410.17247): halve by attention before 8, 16, 24 of 32, positions renumbered.

    Source: github.com/Cooperx521/PyramidDrop.
    """
    layers = scale_layers((8, 16, 24), num_layers)
    stages = (
        Stage(layer=layer, keep=keep, selector="attention")
        for layer, keep in zip(layers, (0.5, 0.25, 0.125), strict=True)
    )
    return Plan(stages=tuple(stages), positions="reset")


def divprune(num_layers: int, *, keep: float = 0.098) -> Plan:
    """DivPrune (CVPR 2025, arXiv 2503.02175): before the first layer, greedy max-min on 1 - cosine.

    Source: github.com/vbdi/divprune.
    """
    return Plan(stages=(Stage(layer=0, keep=keep, selector="diversity"),))


def todre(
    num_layers: int,
    *,
    variant: Literal["max_sum", "k_center"] = "max_sum",
    keep: float = 0.25,
    drop_below: float | None = 0.10,
) -> Plan:
    """ToDRE (arXiv 2505.18757): a diverse subset before the first layer, then none from depth 7L/8 where unneeded.

    variant: "k_center" is stage 1 of the paper's first version, "max_sum" that of the second. The paper keeps 25 % or
    10 %. drop_below: stage 2 drops all image tokens where the text's attention share on the image and the image's on
    the text are both under this; None leaves stage 2 out. The shares are means over heads at that layer; ours leave
    the first token out of what the image attends to, take for text's questions what follows the last image, and want
    all rows of a batch under the limit, since its layers run as one.
    Raises PlanError for an unknown variant.
    """
    if variant not in ("max_sum", "k_center"):
        raise PlanError(f"variant must be 'max_sum' or 'k_center', got {variant!r}")
    first, second = scale_layers((0, 28), num_layers)
    stages = [Stage(layer=first, keep=keep, selector=variant)]
    if drop_below is not None:
        stages.append(Stage(layer=second, keep=0.0, attention_below=drop_below))
    return Plan(stages=tuple(stages))


def cdpruner(num_layers: int, *, keep: float = 1 / 9) -> Plan:
    """CDPruner (NeurIPS 2025, arXiv 2506.10967): before the first layer, a DPP conditioned on the instruction.

    The default is 64 of LLaVA-1.5's 576 tokens, one of the counts the paper reports. Source:
    github.com/Theia-4869/CDPruner; where we differ is said at the selector `dpp`.
    """
    return Plan(stages=(Stage(layer=0, keep=keep, selector="dpp"),))


def dart(num_layers: int, *, layer: int | None = None, keep: float = 0.75) -> Plan:
    """DART (arXiv 2502.11494): before layer 2 of 32, keep a few pivots and what duplicates them least.

    The default share is that of TensorRT-Edge-LLM, which ships the method. Source: github.com/ZichenWen1/DART; where
    we differ is said at the selector `dart`.
    """
    layer = scale_layers((2,), num_layers)[0] if layer is None else layer
    return Plan(stages=(Stage(layer=layer, keep=keep, selector="dart"),))


def with_selector(plan: Plan, selector: str) -> Plan:
    """The same schedule with another selector in every stage."""
    return replace(plan, stages=tuple(replace(stage, selector=selector) for stage in plan.stages))


def random_control(plan: Plan) -> Plan:
    """The same schedule with tokens drawn by a fixed seed: what a selector must beat."""
    return with_selector(plan, "random")


def uniform_control(plan: Plan) -> Plan:
    """The same schedule with tokens spread evenly over the grid: what a content-aware selector must beat."""
    return with_selector(plan, "uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One row of a comparison: a published system, or a control.

    name: as tables print it. reference: where it was published. plan: from a model's number of layers to the system's
    own plan, at its published budget.
    """

    name: str
    reference: str
    plan: Callable[[int], Plan]


_BTP = "arXiv 2505.22038"
SYSTEMS: dict[str, System] = {
    "dense": System(name="dense", reference="no pruning", plan=dense),
    "btp_paper": System(name="BTP (paper)", reference=_BTP, plan=btp_paper),
    "btp_released": System(name="BTP (released)", reference=f"{_BTP}, released code", plan=btp_released),
    "fastv": System(name="FastV", reference="ECCV 2024, arXiv 2403.06764", plan=fastv),
    "vtw": System(name="VTW", reference="AAAI 2025, arXiv 2405.05803", plan=vtw),
    "pyramiddrop": System(name="PyramidDrop", reference="CVPR 2025, arXiv 2410.17247", plan=pyramiddrop),
    "divprune": System(name="DivPrune", reference="CVPR 2025, arXiv 2503.02175", plan=divprune),
    "todre_k_center": System(
        name="ToDRE (k-center)", reference="arXiv 2505.18757v1", plan=lambda n: todre(n, variant="k_center")
    ),
    "todre_max_sum": System(name="ToDRE (max-sum)", reference="arXiv 2505.18757v2", plan=todre),
    "cdpruner": System(name="CDPruner", reference="NeurIPS 2025, arXiv 2506.10967", plan=cdpruner),
    "dart": System(name="DART", reference="arXiv 2502.11494", plan=dart),
    "random": System(name="random", reference="control", plan=lambda n: random_control(btp_paper(n))),
    "uniform": System(name="uniform", reference="control", plan=lambda n: uniform_control(btp_paper(n))),
}


def _stages(
    selector: str,
    layers: Sequence[int],
    keep: Sequence[float],
    attention_weights: Sequence[float],
    oversample: Sequence[float],
) -> list[Stage]:
    lengths = len(layers), len(keep), len(attention_weights), len(oversample)
    if len(set(lengths)) > 1:
        raise PlanError(
            "layers, keep, attention_weights and oversample must be of one length, got "
            f"{', '.join(map(str, lengths))}; give one value a stage"
        )
    return [
        Stage(layer=layer, keep=share, selector=selector, attention_weight=weight, oversample=factor)
        for layer, share, weight, factor in zip(layers, keep, attention_weights, oversample, strict=True)
    ]


def _check_family(family: str, known: Collection[str]) -> None:
    if family not in known:
        raise PlanError(f"family must be one of {', '.join(known)}, got {family!r}; pass layers for another model")
