"""Tables made from `bench/results/*.json`: `python bench/tables.py` writes them into README.md and docs/limits.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def read(name: str) -> dict[str, Any]:
    path = ROOT / "bench" / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    return f"{hardware['cpu']}, {hardware['cores']} cores, PyTorch {versions['torch']}"


def demo() -> str:
    record = read("demo")
    if not record:
        return ""
    rows = [
        f"| {m['title']} | {m['parameters'] / 1e6:.2f}M | {m['train_tokens_per_second']:,.0f} | {m['valid_loss']:.3f} "
        f"| {m['per']:.1%} | {m['wer']:.1%} | {m['decode_words_per_second']:,.0f} "
        f"| {m['peak_memory_bytes'] / 2**20:,.0f} |"
        for m in record["models"]
    ]
    first = record["models"][0]
    plain = []
    if "per_baseline" in first:
        plain = [f"| *{first['baseline']}* | | | | {first['per_baseline']:.1%} | {first['wer_baseline']:.1%} | | |"]
    buckets = [row["bucket"] for row in first["by_length"]]
    lengths = [
        "| " + " | ".join([m["title"], *(f"{row['per']:.1%}" for row in m["by_length"])]) + " |"
        for m in record["models"]
    ]
    return "\n".join(
        [
            "| model | parameters | train tokens/s | valid loss | PER | WER | words/s | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            *plain,
            "",
            "| PER by letters in the word | " + " | ".join(buckets) + " |",
            "|---|" + "---|" * len(buckets),
            *lengths,
            "",
            f"{record['budget']['seconds']:.0f} seconds each; {machine(record)}. `bench/demo.py`",
        ]
    )


def figures() -> str:
    lines = []
    if speed := read("speed"):
        train, decode = speed["training"], speed["decoding"]
        rate = {name: found["median"] for name, found in train["tokens_per_second"].items()}
        words, share = decode["words_per_second"], train["share_of_gemm_peak"]
        lines += [
            "| the demo's Transformer | Headway | `torch.nn.Transformer` | ratio |",
            "|---|---|---|---|",
            f"| training as the demo does, Muon, {'bf16' if train['demo_in_bf16'] else 'fp32'}, tokens/s "
            f"(theirs AdamW, fp32) | {rate['headway demo']:,.0f} | {rate['torch.nn.Transformer']:,.0f} "
            f"| {train['ratio_demo']:.2f}x |",
            f"| training, both AdamW, fp32, tokens/s | {rate['headway adamw']:,.0f} "
            f"| {rate['torch.nn.Transformer']:,.0f} "
            f"| {train['ratio_adamw']:.2f}x |",
            f"| training, Muon against AdamW, fp32, tokens/s | {rate['headway muon']:,.0f} "
            f"| {rate['torch.nn.Transformer']:,.0f} | {train['ratio_muon']:.2f}x |",
            f"| the same, its dropout switched off | {rate['headway muon']:,.0f} "
            f"| {rate['torch.nn.Transformer, no dropout']:,.0f} "
            f"| {rate['headway muon'] / rate['torch.nn.Transformer, no dropout']:.2f}x |",
            f"| greedy decoding, fp32, batch 256, words/s (theirs without a cache) | {words['headway']['median']:,.0f} "
            f"| {words['torch.nn.Transformer']['median']:,.0f} | {decode['ratio']:.2f}x |",
            "",
            f"Training reaches {share['headway adamw']:.0%} of the machine's measured matrix-product peak of "
            f"{train['gemm_peak_gflops']:.0f} GFLOP/s with AdamW, {share['headway muon']:.0%} with Muon, whose own "
            f"products are not counted. A single word takes "
            f"{decode['single_word_ms']['median']:.1f} ms (at most {decode['single_word_ms']['max']:.1f}). "
            f"{machine(speed)}. `bench/speed.py`",
            "",
        ]
    if quality := read("pronounce"):
        lines += ["| pronouncing, same split | WER | PER | words/s |", "|---|---|---|---|"]
        for name in ("phonetisaurus", "headway greedy", "headway beams 4"):
            q = quality[name]
            lines.append(f"| {name} | {q['wer']:.1%} | {q['per']:.2%} | {q['words_per_second']:,.0f} |")
        trained, now = quality["training"], quality["training_tokens_per_second_now"]
        lines += [
            "",
            f"`headway train pronounce`: {trained['parameters'] / 1e6:.2f}M parameters, {trained['tokens'] / 1e6:.0f}M "
            f"tokens in {trained['seconds'] / 60:.0f} minutes of training on {trained['cores']} core(s); all cores of "
            f"this machine train it at {now:,.0f} tokens/s, {trained['tokens'] / now / 60:.0f} minutes in all. "
            f"Phonetisaurus trained in {quality['phonetisaurus']['train_seconds'] / 60:.1f} minutes. "
            f"{machine(quality)}. `bench/pronounce.py`",
            "",
        ]
    if start := read("start"):
        seconds, adds = start["seconds"], max(0.0, start["import_headway_adds"])  # a spread can outweigh it
        lines.append(
            f"`headway --help` takes {seconds['headway --help']['median']:.2f} s; `import headway` adds "
            f"{adds:.2f} s to `import torch` ({seconds['import torch']['median']:.1f} s), "
            f"every public name together {start['every_public_name_adds']:.2f} s. `bench/start.py`"
        )
    return "\n".join(lines).strip()


def published() -> str:
    record = read("published")
    rows = [row for part in ("gpt2", "smollm2", "minilm") for row in record.get(part, [])]
    if not rows:
        return "Not measured yet."
    lines = ["| | Headway, a second | beside | a second | faster | at least | peak MiB, ours and theirs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        bar = f"{row['bar']:g}x{'' if row['met'] else ', missed'}"
        ours, theirs = row["ours_per_second"], row["peer_per_second"]
        lines.append(
            f"| {row['what']} | {ours:,.0f} | {row['peer']} | {theirs:,.0f} "
            f"| {row['ratio']:.2f}x | {bar} | {row['ours_mib']:,.0f}, {row['peer_mib']:,.0f} |"
        )
    words = [
        f"Tokens a second (MiniLM: texts); decoding writes {record['new_tokens']} tokens behind 64; medians of rounds "
        "in turn, each side a process of its own. GPT-2's weights are random, the others real."
    ]
    if quality := record.get("quality"):
        int8 = quality["int8"]
        words.append(
            f"SmolLM2 on {quality['tokens']:,} tokens of prose: perplexity {quality['fp32']['perplexity']:.2f} in "
            f"fp32, {int8['perplexity']:.2f} in int8 ({int8['perplexity_over_fp32'] - 1:+.1%}), whose likeliest token "
            f"is fp32's {int8['greedy_agreement']:.1%} of the time."
        )
    words += [
        f"MiniLM in int8 keeps a cosine of {row['ours_cosine']:.4f} with fp32 (CTranslate2 {row['peer_cosine']:.4f})."
        for row in record.get("minilm", []) if "int8" in row["what"]
    ]  # fmt: skip
    words += [
        f"{row['what']}: {row['ours_seconds']:.1f} s, {row['peer']} {row['peer_seconds']:.1f} s." for row in
        record.get("start", [])
    ]  # fmt: skip
    return "\n".join([*lines, "", " ".join([*words, f"{machine(record)}. `bench/published.py`"])])


def decoding() -> str:
    record = read("published").get("profile")
    if not record:
        return "Not measured yet."
    lines = ["| | ms | reading the weights once | operations | what the time goes to |", "|---|---|---|---|---|"]
    for what, row in record.items():
        if isinstance(row, dict):
            ordered = sorted(row["shares"].items(), key=lambda share: -share[1])
            spent = ", ".join(f"{name} {share:.0%}" for name, share in ordered)
            least = row["weights_mib"] * 2**20 / record["read_gb_s"] / 1e6
            lines.append(f"| {what} | {row['ms']:.1f} | {least:.1f} ms | {row['operations']:,} | {spent} |")
    lines += [
        "",
        f"Weights are read at the {record['read_gb_s']:.0f} GB/s that a large sum reads here. "
        "`bench/published.py --only profile`",
    ]
    return "\n".join(lines)


def mixers() -> str:
    record = read("mixers")
    if not record:
        return ""
    lines = ["| | tokens | ms | beside | ms | faster | at least |", "|---|---|---|---|---|---|---|"]
    for row in record["rows"]:
        name = f"{row['what']}{'' if row.get('way') == 'forward' else ', both ways'}"
        if "not_measured" in row:
            lines.append(f"| {row['what']} | {row['length']:,} | | {row['peer']} | | not measured | |")
            continue
        ours, peer = (row[side]["median"] for side in ("ours_ms", "peer_ms"))
        bar = "" if row["bar"] is None else f"{row['bar']:g}x{'' if row['met'] else ', missed'}"
        lines.append(
            f"| {name} | {row['length']:,} | {ours:,.1f} | {row['peer']} | {peer:,.1f} | {row['ratio']:.2f}x | {bar} |"
        )
    lines += ["", "| memory that one run adds | MiB | peer's MiB | at most |", "|---|---|---|---|"]
    for name, found in record["memory"].items():
        theirs = f"{found['peer_mib']:,.0f}" if "peer_mib" in found else ""
        most = f"{found['most']:g} MiB" if "peer_mib" not in found else "a third"
        lines.append(f"| {name} | {found['mib']:,.0f} | {theirs} | {most}{'' if found['met'] else ', missed'} |")
    grows = [f"{found['exponent']:.2f} ± {found['error']:.2f} {way}" for way, found in record["blocked_growth"].items()]
    least = min(record["beside_reference"], key=lambda row: row["ratio"])
    wins = [f"{words} tokens ({way})" for way, words in record["performer_wins"].items()]
    lines += [
        "",
        f"Both ways is forward and backward. Medians of interleaved runs; 8 heads of width 64, one row, fp32, "
        f"{record['threads']} threads. The window's time grows with the length to the power {' and '.join(grows)} "
        f"(4,096 to 32,768 tokens). The causal Performer layer is faster than full attention {' and '.join(wins)}. "
        f"Of all mixers at 64 to 512 tokens, beside the same with every kernel forced to the reference, the least "
        f"favourable is {least['what']} at {least['length']} tokens, {least['way']}: {least['ratio']:.2f}x as fast. "
        f"On a GPU: {record['gpu']}. {machine(record)}. `bench/mixers.py`",
    ]
    return "\n".join(lines)


def limits() -> str:
    record = read("limits")
    if not record:
        return "Not measured yet on an idle machine."
    lines = [
        "| figure | tokens | bar | reached | what the time goes to | what limits it |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ordered = sorted(row["shares"].items(), key=lambda share: -share[1])
        spent = ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)
        name = f"{row['what']}, beside {row['peer']}{'' if row['way'] == 'forward' else ', both ways'}"
        lines.append(f"| {name} | {row['length']:,} | {row['bar']:g}x | {row['ratio']:.2f}x | {spent} | {limit(row)} |")
    lines += [
        "",
        f"Shares by torch.profiler, of one run of ours. Peak of a 2,048-wide fp32 product here: "
        f"{record['gemm_peak_gflops']:.0f} GFLOP/s; {record['threads']} threads; "
        f"load average when it began {record['load_average']:.1f}; {machine(record)}. `bench/limits.py`",
    ]
    return "\n".join(lines)


def limit(row: dict[str, Any]) -> str:
    """What the matrix products alone would allow, were all else free."""
    if "least_ms" not in row:
        return ""
    return (
        f"its products alone, at the machine's peak, take {row['least_ms']:.1f} of {row['ours_ms']['median']:.1f} ms: "
        f"{row['most_ratio']:.1f}x were all else free"
    )


def look() -> str:
    record = read("look")
    if not record:
        return ""
    named = {
        "headway: forward": "a forward pass",
        "headway: look, one map": "a look, one whole map",
        "headway: look, one map summarised": "a look, one map in blocks and the largest of each row",
        "transformers: output_attentions": "transformers, `output_attentions=True`",
    }
    rows = []
    for name, title in named.items():
        cells = []
        for found in record["a_map_of_six_layers"].values():
            side = found[name]
            cells.append(
                side.get("not_tried") or side.get("failed") or f"{side['seconds']:,.2f} s, {side['mib']:,.0f} MiB"
            )
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    lengths = [f"{int(length):,} tokens" for length in record["a_map_of_six_layers"]]
    cost = ", ".join(f"{100 * v['share_of_a_forward']:.1f}% at {k}" for k, v in record["overhead"].items())
    less = record["times_less_memory_for_one_layer"]["headway: look, a layer's maps in turn"]
    return "\n".join(
        [
            "| MiniLM's sizes, one thread | " + " | ".join(lengths) + " |",
            "|---|" + "---|" * len(lengths),
            *rows,
            "",
            f"Capture costs this share of a forward pass: {cost} tokens. A layer's maps of 2,048 tokens, one after the "
            f"other, take {less:.1f} times less memory than transformers'. {machine(record)}. `bench/look.py`",
        ]
    )


def pages() -> str:
    record = read("look_page")
    if not record:
        return ""
    rows = []
    for title, sizes in record.items():
        if not isinstance(sizes, dict) or title in ("hardware", "versions"):
            continue
        heads = 2 * record["heads"] if "heads" in title else record["heads"]
        for length, found in sizes.items():
            if "open" not in found:
                rows.append(f"| {title} | {int(length):,} x {heads} | {found.get('failed', 'failed')[:60]} | | | |")
                continue
            ms = [found[k]["median"] * 1000 if k in found else None for k in ("point at a token", "open another head")]
            cells = ["" if value is None else f"{value:,.0f} ms" for value in ms]
            rows.append(
                f"| {title} | {int(length):,} x {heads} | {found['bytes'] / 1e6:,.1f} MB "
                f"| {found['open']['median']:,.2f} s | {cells[0]} | {cells[1]} |"
            )
    return "\n".join(
        [
            "| page | tokens x heads | size | opens in | points at a token in | opens another head in |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Medians; headless Chromium; maps beyond 512 tokens are invented. {machine(record)}. `bench/look_page.py`",
        ]
    )


def training() -> str:
    record, prose = read("train"), read("prose")
    lines = []
    if record:
        decoder, skewed, loop = record["decoder"], record["skewed"], record["loop"]
        speed, real = decoder["tokens_per_second"], skewed["real_tokens_per_second"]
        sides = [
            (f"10.8M decoder, {kind}", speed, *(decoder[kind][key] for key in ("ours", "fastest_peer", "ratio")), bar)
            for kind, bar in (("fp32", "1.0x"), ("bf16", "1.1x"))
        ]
        sides.append(("masked LM, skewed lengths", real, skewed["ours"], skewed["theirs"], skewed["ratio"], "2.5x"))
        lines += [
            "| training | ours | tokens/s | fastest peer | tokens/s | ratio | bar |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {what} | {ours.removeprefix('headway ')} | {fast[ours]['median']:,.0f} | {peer} "
                f"| {fast[peer]['median']:,.0f} | {ratio:.2f}x | {bar} |"
                for what, fast, ours, peer, ratio, bar in sides
            ),
            "",
            "Share of the machine's best matrix product (6 FLOPs a weight and token): "
            f"{decoder['fp32']['share_of_gemm_peak_6nd']:.1%} in fp32 (bar 74%), "
            f"{decoder['bf16']['share_of_gemm_peak_6nd']:.1%} in bf16 (bar 62%). The loop costs "
            + " and ".join(f"{part['overhead']:.1%} ({name})" for name, part in loop.items())
            + " over the bare step (bar 2%), a checkpoint every 100 steps "
            + " and ".join(f"{part['checkpoint_overhead_every_100_steps']:.2%}" for part in loop.values())
            + f" (bar 3%). Medians of rounds in turn. {machine(record)}. `bench/train.py`",
        ]
    if prose:
        bits = ", ".join(
            f"{title} {prose[side]['bits_per_byte']:.3f}"
            for side, title in (
                ("ours", "recipe `prose`"),
                ("theirs", "nanoGPT-style, bytes"),
                ("theirs-tokens", "nanoGPT-style, our tokens"),
            )
            if side in prose
        )
        ours = prose.get("ours", {})
        packed = ", ".join(f"{n} {ours[f'bits_per_byte_{n}_baseline']:.3f}" for n in ("xz", "zstd") if ours)
        seconds = next(side["seconds"] for side in prose.values() if isinstance(side, dict) and "seconds" in side)
        lines += [
            "",
            f"Bits per byte of held-out documentation after {seconds:,.0f} seconds of training: {bits}"
            f"{'; ' + packed if packed else ''}. `bench/prose.py`",
        ]
    return "\n".join(lines)


def fill(text: str) -> str:
    """A page with its marked tables made anew."""
    made = {
        "demo": demo(),
        "figures": figures(),
        "published": published(),
        "decoding": decoding(),
        "mixers": mixers(),
        "limits": limits(),
        "look": look(),
        "pages": pages(),
        "training": training(),
    }
    for name, table in made.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    return text


if __name__ == "__main__":
    for path in (ROOT / "README.md", ROOT / "docs" / "limits.md", ROOT / "docs" / "training.md"):
        path.write_text(fill(path.read_text("utf-8")), "utf-8")
