"""Where the paper and its published code differ: ``--protocol paper`` or ``code``.

The presets hold the values of the published code, so ``code`` leaves a preset as it stands. ``paper`` changes
what the paper says differently and what can be switched:

| setting | code | paper |
|---|---|---|
| model.guidance_dropout | 0.1 in training | 0 |
| loss.anchor_divisor | 4 or 16 | 1: every patch is an anchor |
| loss.base_temperature | 0.07: a factor tau / 0.07 | None: Eq. 8 has no factor |
| loss.phi0, loss.psi0 | per preset | 0.55, 0.15 "for all data sets" (*) |
| loss.sigma_pos, loss.sigma_amb | per preset | 3, 3 (*) |
| train.selection | best, on labelled images | last |
| eval.crf_image | truncated | the original pixels |

(*) of presets with DINO's backbones, for which the paper's values hold.

Not switched, since there is one form of each: proxies are normalised and compared by cosine (Eq. 2 has the
plain mean), the anchor leaves its own sets at the end (Eq. 8 keeps it), patches exactly on a threshold are
ambiguous (Eq. 7 makes them negatives), and the loss is the mean over chunks of the mean over anchors with
positives.
"""

from dataclasses import replace

from ppap.settings.config import Config
from ppap.settings.methods import HEADS

OWN_THRESHOLDS = ("demo", "camvid")
"""Presets whose thresholds were found for a backbone of their own."""


def with_protocol(config: Config, protocol: str) -> Config:
    """The settings of a preset under a protocol, before any option of the command line.

    Args:
        config: a preset, with its method; the loss of HP and STEGO is not PPAP's, and stays.
        protocol: ``code`` or ``paper``; see above.
    """
    config = replace(config, protocol=protocol)
    if protocol == "code":
        return config
    config = replace(
        config,
        train=replace(config.train, selection="last"),
        eval=replace(config.eval, crf_image="original"),
    )
    if config.method in HEADS:
        return config
    loss = replace(config.loss, anchor_divisor=1, base_temperature=None)
    if config.preset not in OWN_THRESHOLDS:
        loss = replace(loss, phi0=0.55, psi0=0.15, sigma_pos=3.0, sigma_amb=3.0)
    return replace(config, model=replace(config.model, guidance_dropout=0.0), loss=loss)
