"""The page's style sheet: one set of colours for light, one for dark; print is always light."""

_LIGHT = """
  --ground: #f6f7f5; --card: #ffffff; --ink: #191d21; --soft: #55606b; --line: #dde2e5; --accent: #0a6480;
  --prepare: #93add0; --tokens: #4d86c9; --coarse: #114f91; --rerank: #128a86; --scan: #5cb28a; --other: #aab2b9;
  --search: #191d21; --gather: #d99a1e; --losses: #ecc75a; --statistics: #d56f35; --ema: #b23b4a;
  --backward: #83509c; --rest: #c6cdd2; --entropy: #5f7d16; --entropy-back: #9bb83f;
"""
_DARK = """
  --ground: #101418; --card: #181e24; --ink: #e9edf0; --soft: #a7b2bc; --line: #313a43; --accent: #62c6e0;
  --prepare: #7f9cc4; --tokens: #5c9ae0; --coarse: #3a7fd0; --rerank: #35b3ad; --scan: #7bd0a6; --other: #7d8790;
  --search: #e9edf0; --gather: #e8ad3c; --losses: #f2d67c; --statistics: #ea8a52; --ema: #e06676;
  --backward: #b583cf; --rest: #4a545d; --entropy: #93b53a; --entropy-back: #cbdf8d;
"""
_PARTS = (
    *("prepare", "tokens", "coarse", "rerank", "scan", "other", "search"),
    *("gather", "losses", "statistics", "ema", "backward", "rest", "entropy", "entropy-back"),
)
_ALIKE = {  # drawn in the colour of what does the same work
    "sampling": "rerank",
    "codebook gradient": "ema",
    "propagation": "backward",
    "entropy forward": "entropy",
    "entropy backward": "entropy-back",
    "quantizer forward": "coarse",
    "quantizer backward": "backward",
    "codebook update": "ema",
    "start": "prepare",
    "assignment": "coarse",
    "sums": "statistics",
    "update": "ema",
    "last pass": "tokens",
}


def colour(name: str) -> str:
    """The CSS class of a stage or kernel, without its c-."""
    name = name.removeprefix("k-means ")
    return _ALIKE.get(name, name)


_COLOURS = "\n".join(f".c-{name} {{ fill: var(--{name}); background: var(--{name}); }}" for name in _PARTS)

STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }}
header p.kicker {{ margin: 0 0 6px; color: var(--accent); font-weight: 600; font-size: 14px; }}
h1 {{ font-size: clamp(24px, 4.2vw, 38px); line-height: 1.15; margin: 0 0 10px; letter-spacing: -0.015em;
  font-weight: 680; text-wrap: balance; }}
h1 .x {{ color: var(--soft); font-weight: 400; padding: 0 0.08em; }}
p.lead {{ font-size: clamp(17px, 2vw, 20px); margin: 0 0 6px; text-wrap: balance; }}
h1 span {{ white-space: nowrap; }}
p.source {{ color: var(--soft); margin: 0; max-width: 75ch; overflow-wrap: anywhere; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0; }}
.cards div {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }}
.cards dt {{ color: var(--soft); font-size: 14px; line-height: 1.35; }}
.cards dd {{ margin: 2px 0 0; font-size: 26px; font-weight: 640; letter-spacing: -0.01em; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; }}
.cards dd.note {{ font-size: 13.5px; font-weight: 400; letter-spacing: 0; color: var(--soft); white-space: normal; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin: 0 0 20px; overflow-wrap: anywhere; }}
h2 {{ font-size: 21px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }}
h3 {{ font-size: 16px; margin: 22px 0 8px; display: flex; flex-wrap: wrap; gap: 2px 12px;
  justify-content: space-between; align-items: baseline; }}
h3 span {{ font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }}
section > p {{ margin: 0 0 14px; max-width: 75ch; }}
p.quiet, .quiet {{ color: var(--soft); }}
svg {{ display: block; }}
svg.chart {{ width: 100%; height: auto; overflow: visible; }}
svg.narrow {{ display: none; }}
svg.bar {{ border-radius: 6px; overflow: hidden; }}
svg text {{ fill: var(--ink); font-family: inherit; }}
.frame {{ fill: none; stroke: var(--line); }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
.tick, .axis {{ fill: var(--soft) !important; font-size: 0.93em; }}
.roof {{ stroke: var(--ink); stroke-width: 2; fill: none; }}
.roof.second {{ stroke: var(--soft); stroke-width: 1.5; }}
.roof.cache {{ stroke: var(--soft); stroke-dasharray: 5 5; stroke-width: 1.3; }}
.roof-label {{ fill: var(--soft) !important; }}
.roof-label, .point-label {{ paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }}
.point-label {{ font-weight: 600; }}
.leader {{ stroke: var(--soft); stroke-width: 1; }}
svg.chart + p, table + p {{ margin-top: 12px; }}
section > :last-child {{ margin-bottom: 0; }}
.point {{ stroke: var(--card); stroke-width: 1.5; }}
.part {{ stroke: var(--card); stroke-width: 1; }}
.ground {{ fill: var(--line); }}
.ours {{ fill: var(--accent); }}
.theirs {{ fill: var(--other); }}
{_COLOURS}
.legend {{ list-style: none; margin: 10px 0 0; padding: 0; display: grid; gap: 4px 28px;
  grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }}
.legend li {{ display: grid; grid-template-columns: 14px 1fr auto minmax(3.7em, max-content); gap: 6px;
  align-items: center; font-variant-numeric: tabular-nums; }}
.legend i {{ width: 12px; height: 12px; border-radius: 3px; display: block; }}
.legend .share {{ color: var(--soft); text-align: right; white-space: nowrap; }}
.scroll {{ overflow-x: auto; margin: 0 -24px; padding: 0 24px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 7px 0 7px 20px; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }}
th {{ color: var(--soft); font-weight: 500; font-size: 14px; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
table.words td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
table.words th {{ width: 1%; font-weight: 400; font-size: inherit; }}
tbody tr:last-child > * {{ border-bottom: 0; }}
ol.hints {{ margin: 8px 0 0; padding: 0; list-style: none; counter-reset: hint; }}
ol.hints li {{ counter-increment: hint; padding: 10px 0 10px 38px; position: relative; }}
ol.hints li::before {{ content: counter(hint); position: absolute; left: 0; top: 11px; width: 24px; height: 24px;
  border-radius: 50%; border: 1px solid var(--line); color: var(--accent); font-size: 13px; line-height: 22px;
  text-align: center; font-weight: 600; }}
ol.hints b {{ display: block; font-weight: 620; }}
code {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.9em; }}
footer {{ color: var(--soft); font-size: 14px; }}
@media (max-width: 640px) {{
  main {{ padding: 24px 14px 40px; }}
  section {{ padding: 18px 16px; }}
  .scroll {{ margin: 0 -16px; padding: 0 16px; }}
  .cards {{ grid-template-columns: 1fr 1fr; gap: 8px; }}
  .cards div {{ padding: 11px 12px; }}
  .cards dd {{ font-size: 21px; }}
  svg.wide {{ display: none; }}
  svg.narrow {{ display: block; }}
  .legend {{ grid-template-columns: 1fr; }}
  table.words, table.words tbody, table.words tr, table.words td, table.words th {{ display: block; }}
  table.words tr > * {{ border: 0; padding: 0; width: auto; font-size: 15px; }}
  table.words tr {{ border-bottom: 1px solid var(--line); padding: 8px 0; }}
  table.words tr:last-child {{ border-bottom: 0; padding-bottom: 0; }}
}}
@media print {{
  :root {{ {_LIGHT} --ground: #ffffff; }}
  main {{ max-width: none; padding: 0; }}
  section, .cards div {{ break-inside: avoid; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
