"""Draw the README's picture, in light and dark: `python book/_ext/readme_picture.py`."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from imsvd_core import plots
from imsvd_core.discretization import joint, soft_discretize
from imsvd_core.loss import cross_joint_entropy

STEPS = (0, 12, 40, 300)


def matrices() -> dict[int, tuple[float, torch.Tensor]]:
    """Loss and joint matrix of sixteen free samples, three variables of four values, at STEPS."""
    torch.manual_seed(3)
    logits = torch.randn(16, 3 * 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    kept = {}
    for step in range(max(STEPS) + 1):
        loss = cross_joint_entropy(logits, logits, units=4).total
        if step in STEPS:
            kept[step] = (loss.item(), joint(soft_discretize(logits, 4).detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kept


def main() -> None:
    kept = matrices()

    def draw(theme: plots.Theme) -> Figure:
        drawing, axes = plots.figure(8, 2.3, cols=len(STEPS))
        for ax, (step, (loss, matrix)) in zip(axes, kept.items(), strict=True):
            plots.draw_joint(ax, matrix, 4, theme, norm=PowerNorm(0.5, 0, 1 / 4), colorbar=False)
            ax.set_title(f"step {step}: loss {loss:.2f}".replace("-", "\N{MINUS SIGN}"), fontsize=9)
        return drawing

    picture = plots.show(draw, alt="Four joint matrices of three variables, from noise to order.")
    for theme, content in re.findall(
        r'class="imsvd-(light|dark)[^>]*?base64,([^"]+)"', picture.html
    ):
        Path(__file__).parents[1].joinpath("_static", f"noise-to-order-{theme}.svg").write_bytes(
            base64.b64decode(content)
        )


if __name__ == "__main__":
    main()
