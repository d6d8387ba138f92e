# SPDX-License-Identifier: Apache-2.0
"""Writes the pages' tables from the result files; --check only says whether they are current.

python examples/paper/readme_tables.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import paper_tables
from paper_tables import load

#: Of the benchmark's optimizers, those in docs/evidence.md.
STEPS = (
    "NAdamW",
    "Lion",
    "Muon",
    "Adam-mini",
    "GaLore",
    "Adapprox, k = 1",
    "Adapprox, k = 8",
    "Adapprox, k = 8, int8 first moment",
    "Adapprox, k = 8, int4 first moment",
    "Adapprox, k = 8, bf16 weights, int8 first moment",
    "Adapprox, k = 8, bf16 weights, int4 first moment",
    "Adapprox, k = 64",
    "Adapprox, paper, k = 8",
    "Adafactor (torch)",
    "MicroAdam",
    "CAME",
    "AdamW8bit",
)
#: What a corpus is called, and its result file.
CORPORA = {"presidential messages": "losses", "Shakespeare and Milton": "losses_shakespeare"}
COMMANDS = {
    "losses": "python examples/paper/losses.py",
    "losses_shakespeare": "python examples/paper/losses.py --corpus shakespeare",
}
OURS, VIEWS = "0, 1, 2, 3", "1, 2, 3 by `MatrixViews`"
#: Those of the README's table: their names in the results of memory and time, and at which stages
#: of ZeRO they run.
SUMMARY = {
    "AdamW": ("AdamW, fused", "AdamW, fused", "0, 1, 2, 3"),
    "NAdamW": ("NAdamW", "NAdamW", "as AdamW"),
    "Adafactor": ("Adafactor (torch)", "Adafactor (torch)", VIEWS),
    "CAME": ("CAME", "CAME", VIEWS),
    "AdamW8bit": ("AdamW8bit", "AdamW8bit", "not tried"),
    "Muon": ("Muon", "Muon", f"{VIEWS}, or DeepSpeed's own"),
    "Adam-mini": ("Adam-mini", "Adam-mini", "not tried"),
    "GaLore": ("GaLore", "GaLore", "2, 3 by `MatrixViews`"),
    "Lion": ("Lion", "Lion", "as AdamW"),
    "Adapprox, default, k = 8": ("Adapprox, k = 8", "Adapprox, k = 8", OURS),
    "Adapprox, k = 8, int8 first moment": (
        "Adapprox, k = 8, int8 first moment",
        "Adapprox, k = 8, int8 first moment",
        OURS,
    ),
}
README = Path(__file__).resolve().parent.parent.parent / "README.md"


def losses() -> str:
    """Held-out loss by learning rate, on each corpus."""
    parts = []
    for corpus, file in CORPORA.items():
        data = load(file)
        size = "" if parts else "a small GPT of 0.6 M parameters, "
        lines = [
            f"Held-out nats a byte of {corpus} ({size}{data['steps']} steps, "
            f"{data['seeds']} seeds, each optimizer at its best of the same learning rates; the "
            "basin is the rates within 1 % of it; diverged is the lowest rate at which a run ended "
            "20 % above it; differences "
            f"in pairs of equal seed, with 95 % intervals; `{COMMANDS[file]}`):",
            "",
            "| optimizer | best rate | nats a byte | basin | diverged | minus AdamW "
            "| minus NAdamW |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in data["optimizers"].items():
            gaps = [signed(row.get(key)) for key in ("minus_adamw", "minus_nadamw")]
            bad = f"{min(row['diverged']):g}" if row["diverged"] else "none"
            cells = [name, f"{row['lr']:g}", f"{mean(row['losses']):.3f}", basin(row), bad, *gaps]
            lines.append(f"| {' | '.join(cells)} |")
        for key, what in (
            ("cost_of_low_rank", "What the low rank costs at NAdamW's best rate"),
            ("gain_of_guidance", "Guidance minus the default, at the default's best rate"),
        ):
            if known := data.get(key):
                gap, half = known["difference"]
                lines += [
                    "",
                    f"{what}, {known['lr']:g}, over {known['seeds']} seeds: "
                    f"{gap:+.4f} ± {half:.4f} nats a byte.",
                ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def signed(gap: list[float] | None) -> str:
    """A difference with its interval."""
    return "" if gap is None else f"{gap[0]:+.3f} ± {gap[1]:.3f}"


def basin(row: dict[str, Any]) -> str:
    """The rates within 1 % of the best."""
    low, high = row["basin"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def sizes() -> str:
    """Bytes a parameter of a whole run, the README's first table."""
    memory = load("measured_memory")["optimizers"]

    def cell(name: str) -> str:
        return f"{memory[name]['run_bytes'] / memory[name]['parameters']:.1f}"

    lines = ["| | fp32 weights | bf16 weights |", "|---|---|---|"]
    lines.append(f"| AdamW | {cell('AdamW, fused')} | {cell('AdamW, fused, bf16 weights')} |")
    for kind, shown in (
        ("fp32", ""),
        ("int8", ', `first_moment="int8"` (recommended)'),
        ("int4", ', `first_moment="int4"`'),
    ):
        wide = "Adapprox, k = 8" + (f", {kind} first moment" if shown else "")
        narrow = f"Adapprox, k = 8, bf16 weights, {kind} first moment"
        lines.append(f"| Adapprox{shown} | {cell(wide)} | {cell(narrow)} |")
    return "\n".join(lines)


def evidence() -> str:
    """The README's one table: memory, loss, basin, time and stages of ours and of peers."""
    data, memory = load("losses"), load("measured_memory")["optimizers"]
    steps = load("bench_step_cpu_124m")["optimizers"]
    narrow = load("first_moments")["kinds"]
    lines = [
        "Whole run: bytes a parameter of weights, gradients and state, GPT-2 124M. Loss: held-out "
        f"nats a byte of a small GPT at each one's best learning rate, {data['seeds']} seeds, and "
        "its difference to AdamW's with the 95 % interval. Basin: rates within 1 % of the best. "
        "Time: of a step over fused AdamW's on a CPU. Blank: not measured. "
        "[In full](docs/evidence.md), with commands.",
        "",
        "| optimizer | whole run | loss | minus AdamW | basin | time | ZeRO |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (in_memory, in_time, stages) in SUMMARY.items():
        row = data["optimizers"].get(name)
        held = memory[in_memory]
        size = f"{held['run_bytes'] / held['parameters']:.1f}"
        time = f"{steps[in_time]['ratio']:.1f}" if in_time in steps else "not measured"
        quality = ["", "", ""]
        if row is not None:
            quality = [f"{mean(row['losses']):.3f}", signed(row.get("minus_adamw")), basin(row)]
        cells = [name, size, *quality, time, stages]
        lines.append(f"| {' | '.join(cells)} |")
    for kind in ("int8", "int4"):
        held = memory[in_memory := f"Adapprox, k = 8, bf16 weights, {kind} first moment"]
        row = narrow[f"bf16 at random, {kind}"]
        gap = signed([row["minus_fp32"], row["interval_95"]])
        lines.append(
            f"| {in_memory} | {held['run_bytes'] / held['parameters']:.1f} | | {gap} from fp32 "
            f"weights | | {steps[in_memory]['ratio']:.1f} | {OURS} |"
        )
    return "\n".join(lines)


def update_error() -> str:
    """Error of the update by how the second moment is kept."""
    data = load("update_error_k8")
    lines = [
        "Distance of the update from the one with an uncompressed second moment (k = 8, equal "
        "bytes unless said; `python examples/paper/update_error.py`):",
        "",
        "| second moment kept as | error of the update | largest entry |",
        "|---|---|---|",
    ]
    for name in (
        "paper",
        "paper, on sqrt(V)",
        "tracking, unbalanced",
        "default (tracking, balanced)",
        "default, bf16 factors, half the bytes",
        "default, bf16 factors, twice the rank",
    ):
        row = data["methods"][name]
        lines.append(f"| {name} | {row['update']:.3f} | {row['largest']:.1f} |")
    return "\n".join(lines)


def measured_memory() -> str:
    """What a training process holds, takes for a step, and takes at most."""
    data = load("measured_memory")
    lines = [
        f"Memory: {data['steps']} training steps of GPT-2 124M (batch 1, length 64), each "
        "optimizer in a process of its own on a CPU. First bytes a parameter of weights, gradients "
        "and state together, the rest in MB (2^20 bytes); `estimated` is what "
        "`python -m adapprox_ds estimate` says beforehand "
        "(`python examples/paper/measured_memory.py`). FlashAdamW, the leanest peer that is "
        "published, says 7 bytes of itself:",
        "",
        "| optimizer | whole run | state | estimated | more during a step | peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in data["optimizers"].items():
        run = f"{row['run_bytes'] / row['parameters']:.2f}"
        state, estimated, step = (
            "-" if row[key] is None else f"{row[key] / 2**20:.1f}"
            for key in ("state_bytes", "estimated_bytes", "step_bytes")
        )
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(f"| {name} | {run} | {state} | {estimated} | {step} | {peak} |")
    return "\n".join(lines)


def checkpoints() -> str:
    """Size and time of a 124M-parameter checkpoint."""
    data = load("checkpoint_size")
    lines = [
        "A checkpoint of GPT-2 124M in MB (2^20 bytes), one process on 2 CPU cores, times rough "
        "(`python examples/paper/checkpoint_size.py`):",
        "",
        "| optimizer | universal MB | second moment MB | convert s | load s |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        lines.append(
            f"| {name} | {row['universal MiB']:.0f} | {row['2nd moment MiB']:.1f} | "
            f"{row['convert s']:.1f} | {row['load s']:.1f} |"
        )
    return "\n".join(lines)


def first_moments() -> str:
    """Held-out loss by how weights and the first moment are kept, by corpus and learning rate."""
    parts = []
    for file, more in (
        ("first_moments", ""),
        ("first_moments_shakespeare", " --corpus shakespeare"),
        ("first_moments_0.00025", " --lr 0.00025"),
    ):
        data = load(file)
        first = next(iter(data["kinds"]))
        seeds = len(data["kinds"][first]["losses"])
        what = "The same, Shakespeare and Milton" if "corpus" in more else "The same"
        what = what if parts else "The small GPT, presidential messages, k = 8"
        command = f"python examples/paper/first_moments.py{more}"
        lines = [
            f"{what}, lr {data['lr']}, {data['steps']} steps, {seeds} seeds in pairs, with 95 % "
            f"intervals; bytes of weights, gradients and state (`{command}`):",
            "",
            "| weights, first moment | nats a byte | minus the first row | bytes a parameter |",
            "|---|---|---|---|",
        ]
        for name, row in data["kinds"].items():
            gap = f"{row['minus_fp32']:+.4f} ± {row['interval_95']:.4f}" if name != first else ""
            size = f"{row['bytes_a_parameter']:.2f}"
            lines.append(f"| {name} | {mean(row['losses']):.4f} | {gap} | {size} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def convergence() -> str:
    """What MicroAdam's theorems bound, after the longest runs, and how fast it falls."""
    data = load("convergence")
    problems = data["problems"].values()
    last = f"T = {data['steps'][-1]:,}"
    lines = [
        f"Runs of T = {data['steps'][0]:,} to {data['steps'][-1]:,} steps, 5 seeds, each optimizer "
        "at its best c of the same; slopes of log against log T, with the smallest and the largest "
        "of the seeds (`python examples/paper/convergence.py`):",
        "",
        f"| optimizer | non-convex: mean squared gradient norm, {last} | slope "
        f"| Polyak-Lojasiewicz: f - f*, {last} | slope |",
        "|---|---|---|---|---|",
    ]
    lines.append(
        "| the theorems' rates | | {:.2f} | | {:.2f} |".format(*(p["slope"] for p in problems))
    )
    for name in next(iter(problems))["methods"]:
        rows = [problem["methods"][name] for problem in problems]
        cells = [
            cell
            for row in rows
            for cell in (
                f"{row['bounded'][-1]:.2g}",
                "{:.2f} ({:.2f} to {:.2f})".format(*row["slope"]),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def step_time() -> str:
    """Time of a step on a CPU."""
    data = load("bench_step_cpu_124m")
    lines = [
        f"Time of an optimizer step, {data['parameters'] / 1e6:.1f} M parameters in GPT-2 124M's "
        f"shapes, {data['threads']} CPU threads; median ratio in one run, with the smallest and "
        "the largest (`python examples/paper/bench_step.py`):",
        "",
        "| optimizer | time / fused AdamW | bytes of state a parameter |",
        "|---|---|---|",
    ]
    for name in STEPS:
        if (row := data["optimizers"].get(name)) is not None:
            spread = f"{row['ratio']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
            lines.append(f"| {name} | {spread} | {row['state_bytes'] / data['parameters']:.2f} |")
    return "\n".join(lines)


def scopes() -> str:
    """Memory and traffic of both scopes by number of ranks."""
    data = load("scopes_at_scale")
    worlds = list(next(iter(data["models"].values()))["adamw_bytes"])
    lines = [
        f"Second moment on the fullest rank in MB (2^20 bytes), ZeRO-{data['stage']}, "
        f"k = {data['rank']}; traffic of a step on the wire, as a part of the fp32 gradient's, to "
        "512 ranks (simulated cuts, bytes counted by the optimizer's code; "
        "`python examples/paper/scopes_at_scale.py`):",
        "",
        "| model | second moment | " + " | ".join(f"{w} ranks" for w in worlds) + " | traffic |",
        "|---" * (len(worlds) + 3) + "|",
    ]
    for model, found in data["models"].items():
        dense = [f"{found['adamw_bytes'][w] / 2**20:,.2f}" for w in worlds]
        lines.append(f"| {model} | AdamW's | " + " | ".join(dense) + " | |")
        for name, rows in found["scopes"].items():
            held = [f"{rows[w]['second_bytes'] / 2**20:,.2f}" for w in worlds]
            sent = 2 * rows["512"]["summed_bytes"] + rows["512"]["exchanged_bytes"]
            share = f"{sent / (4 * found['numel']):.1%}" if sent else "none"
            lines.append(f"| | {name} | " + " | ".join(held) + f" | {share} |")
    return "\n".join(lines)


#: Pages, and the tables that each holds.
PAGES = {
    README: (sizes, evidence),
    README.parent / "docs" / "evidence.md": (
        losses,
        first_moments,
        update_error,
        convergence,
        measured_memory,
        step_time,
    ),
    README.parent / "docs" / "memory.md": (first_moments,),
    README.parent / "docs" / "limits.md": (scopes,),
    README.parent / "docs" / "moving-a-run.md": (checkpoints,),
    Path(__file__).parent / "README.md": paper_tables.TABLES,
}


def render(page: Path) -> str:
    """A page with every table anew."""
    text = page.read_text()
    for table in PAGES[page]:
        start, end = f"<!-- table: {table.__name__} -->", "<!-- end -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text, count = pattern.subn(lambda _, t=table, s=start, e=end: f"{s}\n{t()}\n{e}", text)
        if count != 1:
            raise ValueError(f"{page} holds {count} places {start!r}; allowed: one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        current = render(page)
        if not options.check:
            page.write_text(current)
        elif current != page.read_text():
            sys.exit(f"{page}: its tables are not those of the result files")


if __name__ == "__main__":
    main()
