"""Draw what sweep_sizes.py measured: `python benchmarks/plot_kernels.py sizes.json docs/images`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

OPS = ("dense_scan", "norm_scan")


def main(source: Path, folder: Path) -> None:
    """Write one figure an op: multiply-adds a second over N, a line for each batch size."""
    result = json.loads(source.read_text())
    rows = result["sizes"]
    batches = sorted({row["B"] for row in rows})
    for op in OPS:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for i, B in enumerate(batches):
            of_batch = [row for row in rows if row["B"] == B]
            N = [row["N"] for row in of_batch]
            for name, style in ((op, "-"), ("mm", ":")):
                rate = [B * row["T"] * row["N"] ** 2 / row["ms"][name] / 1e6 for row in of_batch]
                label = f"B = {B}" if name == op else None
                axes.plot(N, rate, style, color=f"C{i}", label=label, marker=".")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("N")
        axes.set_ylabel("multiply-adds, 10⁹ / s")
        axes.set_title(f"{op} (solid) and torch.mm (dotted), forward, T = {rows[0]['T']}")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{op}_sizes.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
