# SPDX-License-Identifier: Apache-2.0
"""The style sheet of the reports."""

CSS = """
:root {
  --ink: #1d2333; --soft: #667085; --line: #e4e7ee; --paper: #ffffff;
  --back: #f6f7fa; --accent: #4f5bd5; --good: #16935f; --bad: #d5455a;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px;
  letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0 0 8px; }
h3::first-letter { text-transform: uppercase; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead { font-size: 16px; margin-bottom: 6px; }
section {
  background: var(--paper); border: 1px solid var(--line);
  border-radius: 12px; padding: 22px 24px; margin: 0 0 20px;
}
.sub { margin-top: 20px; }
.note { background: #fff7e6; border-left: 3px solid #e0a32e;
  padding: 8px 12px; border-radius: 4px; max-width: none; }
small { color: var(--soft); font-size: 12px; }
.fine { color: var(--soft); font-size: 12.5px; line-height: 1.45;
  max-width: 100ch; margin: 0; }
.mean > * { border-top: 2px solid var(--line); }
.tiles { display: grid; gap: 12px; margin: 0 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div { background: var(--paper); border: 1px solid var(--line);
  border-radius: 12px; padding: 14px 16px; display: grid;
  align-content: start; }
.tiles strong { font-size: 26px; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px;
  vertical-align: bottom; }
tr > :first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
.bar { display: block; position: relative; height: 4px; margin-top: 4px;
  min-width: 70px; background: #eceef4; border-radius: 2px; }
.bar i { position: absolute; top: 0; height: 4px; border-radius: 2px; }
.bar .fill { background: var(--accent); }
.bar .whisker { top: 1px; height: 2px; background: #1d233399; }
img { display: block; width: 100%; image-rendering: pixelated;
  border-radius: 4px; background: #fff; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 12px; line-height: 1.35; color: var(--soft);
  margin-top: 4px; overflow-wrap: anywhere; }
.gallery { display: grid; gap: 14px 12px; margin-bottom: 6px;
  grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }
.gallery img, .cells img { border: 1px solid var(--line); }
.halves { display: grid; gap: 8px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
.gallery .pass img { border: 2px solid var(--good); }
.gallery .fail img { border: 2px solid var(--bad); }
.gallery .pass figcaption::before, .strip.pass > p::before {
  content: "\\2713\\a0"; color: var(--good); font-weight: 700; }
.gallery .fail figcaption::before, .strip.fail > p::before {
  content: "\\2717\\a0"; color: var(--bad); font-weight: 700; }
.strips { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); }
.strip { border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; }
.strip.pass { border-left: 3px solid var(--good); }
.strip.fail { border-left: 3px solid var(--bad); }
.strip > p { font-size: 13px; margin: 0 0 8px; }
.strip > p small { white-space: nowrap; }
.cells { display: grid; grid-auto-flow: column; gap: 8px;
  grid-auto-columns: minmax(0, 1fr); }
.plot { display: inline-block; width: 100%; }
.plot svg { width: 100%; height: auto; }
.plot text { font-family: system-ui, sans-serif !important; fill: #667085; }
pre { background: #f1f3f8; border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: 12.5px; margin: 0 0 12px; }
@media (max-width: 600px) {
  main { padding: 24px 12px 48px; }
  section { padding: 16px 14px; border-radius: 10px; }
  h1 { font-size: 24px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
