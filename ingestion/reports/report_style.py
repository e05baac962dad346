"""The style sheet of the ingest report: light and dark, narrow and wide, screen and paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #56616d; --line: #d9dee4; --card: #f5f7f9; --back: #ffffff;
  --bar: #e4e8ed; --fill: #0072B2; --odd: #D55E00; --good: #00674a; --bad: #b03a00; --warn: #7a5200; --link: #005f99; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9fabb7; --line: #333b45; --card: #1a2027; --back: #11151a;
    --bar: #2b333c; --fill: #56B4E9; --odd: #f08a4b; --good: #35c79a; --bad: #ff9b66;
    --warn: #edb64e; --link: #7cc4f2; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: .95rem; margin: 1.3rem 0 .35rem; }
p { max-width: 52rem; margin: .35rem 0 .8rem; }
a { color: var(--link); }
.soft, .lead { color: var(--soft); }
.lead { margin: 0 0 1rem; }
.verdict { border: 1px solid var(--line); border-left: .4rem solid var(--good); background: var(--card);
  padding: .7rem 1rem; font-size: 1.1rem; font-weight: 600; margin: 1rem 0; }
.verdict.bad { border-left-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--card); padding: .55rem .8rem; }
.tiles b { display: block; white-space: nowrap; font-size: 1.35rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.bar { display: flex; gap: 1px; height: 1.05rem; background: var(--bar); overflow: hidden; border-radius: 2px; }
.bar + .bar { margin-top: .25rem; }
.bar i { flex-basis: 0; min-width: 1.5px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .5rem 0;
  font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.05rem; }
.legend b { font-weight: 400; color: var(--ink); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .87rem; margin: .5rem 0; }
th, td { text-align: left; padding: .28rem .75rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { overflow-wrap: normal; }
td.name, td.long { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.steps { min-width: 9rem; padding-top: .55rem; } td.steps .bar { height: .7rem; }
td.name { min-width: 8rem; }
.status { white-space: nowrap; font-weight: 600; }
.ingested { color: var(--good); } .refused { color: var(--bad); } .warning { color: var(--warn); }
.already_committed, .note { color: var(--soft); }
ol.todo { padding: 0; list-style: none; margin: .6rem 0; }
ol.todo li { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 0 0 .9rem; max-width: 60rem; }
ol.todo li.refused, ol.todo li.warning, ol.todo li.note { color: inherit; }
ol.todo li.refused { border-color: var(--bad); }
ol.todo li.warning { border-color: var(--warn); }
ol.todo .next { display: block; color: var(--soft); }
ol.todo .next::before { content: "→ "; }
.grid { display: grid; grid-template-columns: minmax(9rem, 18rem) repeat(3, minmax(0, 1fr)); gap: .35rem 1.2rem;
  align-items: end; font-size: .82rem; }
.grid.of1 { grid-template-columns: minmax(9rem, 18rem) minmax(0, 1fr); align-items: center; }
.grid.of2 { grid-template-columns: minmax(9rem, 18rem) repeat(2, minmax(0, 1fr)); align-items: center; }
.grid .head { font-weight: 600; color: var(--soft); align-self: end; }
.grid .name { align-self: center; line-height: 1.25; }
.grid .cell { min-width: 0; }
.grid .said { color: var(--soft); font-variant-numeric: tabular-nums; font-size: .76rem; line-height: 1.2;
  padding-bottom: .35rem; }
.grid .rule { grid-column: 1 / -1; border-top: 1px solid var(--line); height: 0; }
.hist { display: block; width: 100%; height: 2.1rem; border-bottom: 1px solid var(--soft); overflow: visible; }
.hist path { fill: var(--fill); } .hist.outlier path { fill: var(--odd); }
.hist line { vector-effect: non-scaling-stroke; stroke: var(--ink); stroke-width: 1.5; }
.hist line.all { stroke-dasharray: 3 3; stroke-width: 1; opacity: .75; }
.axis { position: relative; height: 1.2rem; font-size: .72rem; color: var(--soft); margin: 0 .2rem; }
.axis span { position: absolute; white-space: nowrap; transform: translateX(-50%); font-variant-numeric: tabular-nums; }
.flag { color: var(--odd); font-weight: 600; }
details { border-top: 1px solid var(--line); padding: .35rem 0; }
details > summary { cursor: pointer; padding: .25rem 0; }
summary b { margin-right: .6rem; }
details .inside { padding: 0 0 1rem 1.1rem; }
dl { display: grid; grid-template-columns: minmax(6.5rem, 11rem) 1fr; gap: .2rem 1rem; margin: .5rem 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { background: var(--card); padding: .7rem .9rem; overflow-x: auto; font-size: .8rem; line-height: 1.4; }
@media (max-width: 44rem) {
  body { padding: 1rem .8rem 3rem; }
  .grid { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .1rem .7rem; }
  .grid.of1 { grid-template-columns: 1fr; } .grid.of2 { grid-template-columns: 1fr 1fr; }
  .grid .name { grid-column: 1 / -1; padding-top: .5rem; font-weight: 600; }
  .grid .head.first { display: none; }
  .axis span:nth-child(even) { display: none; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  details .inside { padding-left: .3rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  .minor { display: none; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --card: #f5f5f5; --back: #fff; --bar: #e4e8ed;
    --fill: #0072B2; --odd: #D55E00; --good: #00674a; --bad: #b03a00; --warn: #7a5200; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .bar i, .legend i, .hist path, .tiles div, .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; display: block; }
  tr, li, .tiles, figure { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
}
"""
