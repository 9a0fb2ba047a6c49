"""What figure 2 claims, and whether the records bear it out."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.diagnostics import SinkMassReport
from eotattn.experiments.studies.language import best_rate
from eotattn.experiments.studies.language_study import LanguageStudy, mean_formation

__all__ = ["language_verdict"]

#: Relative gain that is asked for at the training length.
GAIN = 0.01
#: Bits per byte that count as divergence.
DIVERGENCE = 0.5


def language_verdict(study: LanguageStudy) -> str:
    """The claims, the numbers and whether they held, in Markdown; intervals are of 95 % over seeds."""
    lines = []
    for name in study.headline:
        lines += [_gain(study, name, over) for over in ("rope", "alibi")]
        lines += [_stable(study, name), _not_worse_far(study, name)]
    lines.append(_diverges(study, "rope"))
    for name in study.learned:
        lines += [*_key_only(study, name), _sink_falls(study, name)]
    lines += [_formation(study), _sweep(study), _conditions(study)]
    return "\n".join(lines)


def _gain(study: LanguageStudy, name: str, over: str) -> str:
    near = study.recipe.train_length
    ours, theirs = study.interval(name, near), study.interval(over, near)
    saved = study.saving(name, over=over, length=near)
    relative = 1 - ours.mean / theirs.mean
    apart = ours.high < theirs.low
    return (
        f"- **{name}: at least {GAIN:.0%} below {over} at the training length ({near}), intervals apart: "
        f"{_held(relative >= GAIN and apart)}.** {ours:.4f} against {theirs:.4f} bits per byte: {relative:+.2%}, "
        f"intervals {'apart' if apart else 'not apart'}; seed by seed it saves {saved:+.4f}."
    )


def _stable(study: LanguageStudy, name: str) -> str:
    factor, drift = study.recipe.length_factors[-1], study.drift(name)
    means = [study.interval(name, length).mean for length in study.recipe.lengths]
    rise = max(value - min(means[: k + 1]) for k, value in enumerate(means))
    return (
        f"- **{name}: at {factor}x no worse than at 1x, on the same bytes: {_held(drift.mean <= 0)}.** It moves by "
        f"{drift:+.4f}; its largest rise above a shorter context is {rise:+.4f}."
    )


def _not_worse_far(study: LanguageStudy, name: str) -> str:
    factor, far = study.recipe.length_factors[-1], study.recipe.lengths[-1]
    saved = study.saving(name, over="alibi", length=far)
    return (
        f"- **{name}: at {factor}x no worse than ALiBi: {_held(saved.mean >= 0)}.** {study.interval(name, far):.4f} "
        f"against {study.interval('alibi', far):.4f}; seed by seed it saves {saved:+.4f}."
    )


def _diverges(study: LanguageStudy, name: str) -> str:
    drift, far = study.drift(name), study.recipe.lengths[-1]
    readings = ", ".join(f"{kind} {study.interval(kind, far):.3f}" for kind in study.recipe.readings_of(name))
    return (
        f"- **{name} diverges: {_held(drift.mean > DIVERGENCE)}.** From {study.recipe.train_length} to {far} tokens it "
        f"moves by {drift:+.3f} bits per byte (divergence means more than +{DIVERGENCE}). The same weights at {far} "
        f"tokens, read otherwise: {readings}."
    )


def _key_only(study: LanguageStudy, name: str) -> tuple[str, str]:
    """Spike and rise of u(j), counted over the heads of all blocks and seeds."""
    parts = [decoder.key_only for decoder in study.of(name)]
    key_only = torch.cat([part for part in parts if part is not None])
    end = study.recipe.train_length - 1
    spike, rise = key_only[..., 0] - key_only[..., 1], key_only[..., end] - key_only[..., 1]
    reach = max(decoder.reach for decoder in study.of(name))
    return (
        f"- **{name}: u(j) has a spike at the first token: {_held(_most(spike))}.** u(0) - u(1) is positive in "
        f"{int((spike > 0).sum())} of {spike.numel()} heads; mean {float(spike.mean()):+.2f} nats, largest "
        f"{float(spike.max()):+.2f} (held means most heads and more than +0.5 on average; AdamW could move a number of "
        f"the log-prior by about {reach:.2f} nats in this run).",
        f"- **{name}: u(j) rises towards the training length: {_held(_most(rise))}.** u({end}) - u(1) is positive in "
        f"{int((rise > 0).sum())} of {rise.numel()} heads; mean {float(rise.mean()):+.2f} nats.",
    )


def _sink_falls(study: LanguageStudy, name: str) -> str:
    falls = [_mass_falls(decoder.sinks) for decoder in study.of(name)]
    (first, last), (rope_first, rope_last) = (_ends(study.of(each)[0].sinks) for each in (name, "rope"))
    return (
        f"- **{name}: sink mass falls as the signal grows: {_held(all(falls))}.** In {sum(falls)} of {len(falls)} "
        f"seeds. First seed: {first:.2g} in the weakest bin of omega, {last:.2g} in the strongest (RoPE: "
        f"{rope_first:.2g} and {rope_last:.2g}); uniform attention would give {study.uniform_mass:.2g}."
    )


def _formation(study: LanguageStudy) -> str:
    parts = []
    for decoder in study.recipe.variants:
        steps, mass = mean_formation(study.of(decoder.attention))
        parts.append(f"{decoder.attention} {mass[:, 0].mean():.4f} to {mass[:, -1].mean():.4f}")
    return (
        f"- Sink formation: mean mass on the first token before training and after {int(steps[-1])} steps, over "
        f"blocks, heads, queries and seeds: {'; '.join(parts)}."
    )


def _sweep(study: LanguageStudy) -> str:
    rates = study.recipe.sweep.rates
    chosen = {d.attention: best_rate(study.recipe, study.records, d.attention) for d in study.recipe.variants}
    inside = all(rate is not None and min(rates) < rate < max(rates) for rate in chosen.values())
    listed = ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
    return f"- **Every chosen learning rate lies inside the swept range: {_held(inside)}.** {listed}; swept: {rates}."


def _conditions(study: LanguageStudy) -> str:
    recipe, records = study.recipe, study.records.values()
    tokens = recipe.training.steps * recipe.training.batch_size * recipe.train_length
    devices = ", ".join(sorted({record.device for record in records}))
    return (
        f"- {len(recipe.seeds)} seeds at scale `{recipe.scale}`, {tokens / 1e6:.1f} million training bytes a run, the "
        f"same for all; {sum(record.seconds for record in records):.0f} s of runs on {devices}. Rates were chosen on "
        f"validation files; every number above is from held-out files, read once."
    )


def _ends(sinks: SinkMassReport) -> tuple[float, float]:
    mass = sinks.mean_sink_mass[sinks.counts > 0]
    return float(mass[0]), float(mass[-1])


def _mass_falls(sinks: SinkMassReport) -> bool:
    """Whether mass and signal strength are anticorrelated over the bins and the strongest bin is below the weakest."""
    mass = torch.as_tensor(sinks.mean_sink_mass[sinks.counts > 0])
    order = torch.arange(len(mass), dtype=torch.float64)
    first, last = _ends(sinks)
    falls_in_rank = float(torch.corrcoef(torch.stack([order, mass.argsort().argsort().double()]))[0, 1]) < -0.5
    return last < first and falls_in_rank


def _most(values: Tensor) -> bool:
    """Whether more than half of the values are positive, and their mean is above half a nat."""
    return float((values > 0).double().mean()) > 0.5 and float(values.mean()) > 0.5


def _held(condition: bool) -> str:
    return "held" if condition else "did NOT hold"
