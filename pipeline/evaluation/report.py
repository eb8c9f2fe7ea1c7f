"""Reports: what was measured, on what, with what; as a table for a person and as JSON for a script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.output import format_table, number_of, visible

SHOWN_MISSING = 3
SINGULAR = {"texts": "text", "clips": "clip", "videos": "video", "queries": "query", "questions": "question"}
NAMES = {
    "r1": "R@1 (%)",
    "r5": "R@5 (%)",
    "r10": "R@10 (%)",
    "median_rank": "median rank",
    "mean_rank": "mean rank",
    "accuracy": "accuracy (%)",
    "r1_iou_0.5": "R@1 IoU 0.5 (%)",
    "r1_iou_0.7": "R@1 IoU 0.7 (%)",
    "mean_iou": "mean IoU (%)",
}
RANKS = ("median_rank", "mean_rank")  # the other figures are shares, shown in per cent


def report_text(content: dict[str, Any], more_facts: Sequence[Sequence[str]] = ()) -> str:
    """The report as text.

    Args:
        content: What an `evaluate_...` function returned, with the annotations' file name.
        more_facts: Name and value of what only this protocol has to say.
    """
    facts = [*_split_facts(content["split"]), *_scored_facts(content["scored"])]
    facts += [(name, value) for name, value in more_facts]
    if content.get("index"):
        index = content["index"]
        facts.append(
            (
                "index",
                f"{index['factory']}, {number_of(index['moments'], 'moment')} of "
                f"{number_of(index['videos'], 'video')}, selection {index['selection']}; of "
                f"{number_of(index['questions'], 'question')} it finds {index['found']} that an exhaustive search "
                "finds first; the figures below do not use it",
            )
        )
    if "ties" in content:
        facts.append(("ties", content["ties"]))
    interval = content["intervals"]
    drawn = f"{interval['draws']} bootstrap draws over the {interval['over']}, seed {interval['seed']}"
    facts.append(("intervals", f"in brackets, 95 %: {drawn}" if interval["draws"] else "none"))
    width = max(len(name) for name, _ in facts)
    lines = [content["protocol"].capitalize()]
    lines += [f"  {name:<{width}}  {visible(value)}" for name, value in facts]
    return "\n".join(lines) + "\n\n" + _results_table(content)


def _split_facts(split: dict[str, Any]) -> list[tuple[str, str]]:
    part = f", {split['subset']}" if split["subset"] else ""
    only = f", only videos of {split['only']['file']} ({split['only']['sha256'][:12]})" if "only" in split else ""
    used = split["used"]
    counted = ", ".join(f"{count} {noun if count != 1 else SINGULAR[noun]}" for noun, count in used.items())
    missing = split["missing"]
    found = f"{split['found']} of {number_of(split['videos'], 'video')} found"
    if split["found"] is None:
        found = f"{split['videos']}, none looked for"
    if missing:
        names = ", ".join(missing[:SHOWN_MISSING]) + (", ..." if len(missing) > SHOWN_MISSING else "")
        found += f", {len(missing)} missing ({names}): not the whole split, so not comparable with figures on it"
    facts = [
        (
            "split",
            f"{split['dataset']}{part}: {split['file']}, sha256 {split['sha256'][:12]}, {split['rows']} rows{only}",
        ),
        ("videos", found),
        ("used", counted),
    ]
    if "captions_per_video" in split:
        per_video = split["captions_per_video"]
        spread = f"{per_video['least']} to {per_video['most']}, mean {per_video['mean']:.1f}"
        same = per_video["least"] == per_video["most"]
        facts.append(("captions", f"{per_video['least'] if same else spread} a video"))
    return facts


def _scored_facts(scored: dict[str, Any]) -> list[tuple[str, str]]:
    if scored["score"] == "matrix":
        return [("score", f"ready matrix {scored['matrix']}")]
    facts = [
        ("encoder", f"{scored['encoder']} ({scored['fingerprint'][:12]}), {scored['precision']}"),
        ("sampling", scored["sampling"]),
    ]
    frames = "every sampled frame" if scored["selector"] == "all" else f"{scored['selector']}, keep {scored['keep']}"
    frames += f" (scorer {scored['scorer'][:12]})" if "scorer" in scored else ""
    if "frames_per_clip" in scored:
        frames += f"; {scored['frames_per_clip']:.1f} a clip"
    if "moments_per_clip" in scored:
        frames += f", in {scored['moments_per_clip']:.1f} moments"
    facts.append(("frames", frames))
    if scored.get("queries_that_selected"):
        n = scored["queries_that_selected"]
        facts.append(
            ("caution", f"{number_of(n, 'query')[:-1]}{'ies' if n > 1 else 'y'} chose the frames they are scored on")
        )
    by_moments = scored.get("by") == "moments"
    if scored["score"] == "rescore":
        score = f"rescore: frames weighted by a softmax at temperature {scored['temperature']:g}"
        score += "" if by_moments else ", as a search ranks"
    elif scored["score"] == "model":
        score = f"{scored['model']} ({scored['model_fingerprint'][:12]}): the pair score it was trained with"
    elif scored["score"] == "moments":
        of = number_of(scored["background_videos"], "annotated video")
        score = f"the moment that a search would show first; what it stands out from is the mean of {of}"
    elif scored["score"] == "classifier":
        score = "linear classifier over the video's mean, the question's vector and their product"
    else:
        score = "mean: cosine with the " + (
            "moment's pooled vector, as an index ranks" if by_moments else "pooled vector"
        )
    facts.append(("score", score))
    if "by" in scored:
        of = "the best of its moments" if by_moments else "all of its frames together"
        facts.append(("by", f"{scored['by']}: a clip has the score of {of}"))
    return facts


def _results_table(content: dict[str, Any]) -> str:
    results = content["results"]
    names = list(results[0]["values"])
    shows_ties = "ties" in content
    rows = []
    for result in results:
        label = result.get("direction") or result["method"]
        if result.get("dual_softmax"):
            label += f", dual softmax ({result['dual_softmax']:g})"
        cells = [_cell(name, result["values"][name], result["intervals"].get(name)) for name in names]
        rows.append([label, *cells, str(result["queries"]), *([str(result["tied"])] if shows_ties else [])])
    if "chance" in content:
        label = "chance" if len(results) == 1 else f"chance, {results[0]['direction']}"
        blanks = [""] * (1 + shows_ties)
        rows.append([label, *(_cell(name, content["chance"][name], None) for name in names), *blanks])
    return format_table(rows, ["", *(NAMES[name] for name in names), "queries", *(["tied"] if shows_ties else [])])


def _cell(name: str, value: float, interval: Sequence[float] | None) -> str:
    """A figure, and its interval in brackets."""
    scale = 1 if name in RANKS else 100
    text = f"{scale * value:.1f}"
    return text if interval is None else f"{text} ({scale * interval[0]:.1f}-{scale * interval[1]:.1f})"
