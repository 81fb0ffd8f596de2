"""How a report looks: one style sheet, light and dark, and one colour per contrast."""

from anycontrast_datasets.contrast import CONTRAST_NAMES

# Light and dark; each at least 3 : 1 against its background.
_COLORS = {
    "unknown": ("#7b818c", "#9aa1ad"),
    "T1w": ("#3a6bc4", "#6d9bf0"),
    "T1wCE": ("#7d5bd0", "#a98cf5"),
    "T2w": ("#15857a", "#3fbcae"),
    "PDw": ("#5f8a2f", "#93bf5c"),
    "FLAIR": ("#c2661a", "#f0a05a"),
    "DWI": ("#c23b52", "#f07f90"),
    "ADC": ("#a3508a", "#d68cc0"),
    "GRE": ("#80684c", "#bea58a"),
    "SWI": ("#4f6b8a", "#8aa8c9"),
    "T2starw": ("#1f83ad", "#5cbbe3"),
    "FA": ("#8f7000", "#d3b53c"),
    "b0": ("#c4487c", "#f48bb4"),
    "CBF": ("#a8452c", "#e58a70"),
}
_FACES = {
    "stripped": ("#15857a", "#3fbcae"),
    "defaced": ("#5f8a2f", "#93bf5c"),
    "refaced": ("#8f7000", "#d3b53c"),
    "present": ("#c23b52", "#f07f90"),
    "unknown": ("#7b818c", "#9aa1ad"),
}


def contrast_color(name: str) -> str:
    """Return the CSS colour of a contrast: the same in every chart."""
    return f"var(--c-{name if name in _COLORS else 'unknown'})"


def face_color(state: str) -> str:
    """Return the CSS colour of what is known of a face."""
    return f"var(--f-{state})"


def style_sheet() -> str:
    """Return the CSS of a report."""
    assert set(_COLORS) <= set(CONTRAST_NAMES), "colours are for contrasts of the vocabulary"
    variables = [
        "".join(f"--c-{name}:{pair[dark]};" for name, pair in _COLORS.items())
        + "".join(f"--f-{name}:{pair[dark]};" for name, pair in _FACES.items())
        for dark in (0, 1)
    ]
    return (
        f":root{{{_LIGHT}{variables[0]}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK}{variables[1]}}}}}"
        f"@media print{{:root{{{_LIGHT}{variables[0]}}}}}{_RULES}"
    )


_LIGHT = (
    "color-scheme:light;--page:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5a6575;--line:#dfe3e9;"
    "--grid:#e8ebf0;--bar:#51698a;--track:#eef1f5;--warn:#8a4b00;--warn-bg:#fff4e0;--link:#1f5fbf;"
)
_DARK = (
    "color-scheme:dark;--page:#10141a;--card:#181e27;--ink:#e8ecf2;--soft:#a3aebd;--line:#2c3542;"
    "--grid:#262e3a;--bar:#86a3c9;--track:#222a35;--warn:#ffca80;--warn-bg:#33270f;--link:#8ab8ff;"
)
_RULES = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Arial,sans-serif}
.wrap{max-width:1120px;margin:0 auto;padding:0 20px 64px}
header{padding:40px 0 8px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 4px;letter-spacing:-.005em}
h3{font-size:14px;font-weight:600;margin:0 0 10px}
p{margin:0 0 12px;max-width:74ch}
.lead,.note{color:var(--soft)}
.note{font-size:13px;margin:10px 0 0}
a{color:var(--link)}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;padding:12px 0;border-bottom:1px solid var(--line);
 font-size:14px}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px;
 margin:20px 0 0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile .hid-n{font-size:18px}.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:0;font-size:25px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;
 margin-top:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;
 min-width:0;break-inside:avoid}
.card.wide{grid-column:1/-1}.column{display:grid;gap:16px;align-content:start;min-width:0}
.scroll{overflow-x:auto}
.warn{background:var(--warn-bg);color:var(--warn);border-radius:8px;padding:10px 14px;
 margin:14px 0;max-width:none}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.unit{color:var(--soft);font-weight:400;margin-left:4px}
caption{text-align:left;font-size:14px;font-weight:600;padding:0 0 10px}
th{font-weight:500;text-align:left}
thead th{color:var(--soft);font-size:12.5px;font-weight:500;padding:0 0 6px;white-space:nowrap}
td,tbody th{padding:3px 0;vertical-align:middle}
td.n,th.n{text-align:right;padding-left:12px;white-space:nowrap}
tbody th{padding-right:14px}tbody th>span{display:inline-block;max-width:20ch;
 overflow:hidden;text-overflow:ellipsis;white-space:nowrap;vertical-align:bottom}

td.words{padding-left:18px;color:var(--soft);font-size:13.5px;min-width:210px}
th.w{padding-left:18px}td.bar{width:45%;min-width:48px}
.b{display:block;height:13px;border-radius:2px;background:var(--c,var(--bar));min-width:2px}
.b.hid{width:22px!important;background:repeating-linear-gradient(135deg,var(--soft) 0 1.5px,
 transparent 1.5px 5px)}
.hid-n{color:var(--soft);font-size:12.5px}
.stack{display:flex;height:14px;border-radius:2px;overflow:hidden;background:var(--track)}
.stack i{display:block;height:100%;background:var(--c)}
.stack i.hid{background:repeating-linear-gradient(135deg,var(--soft) 0 1.5px,
 transparent 1.5px 5px)}.stack i+i{border-left:1px solid var(--card)}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);margin:0 0 10px}
.key span::before,.swatch::before{content:"";display:inline-block;width:10px;height:10px;
 border-radius:2px;background:var(--c);margin-right:7px}
svg{display:block}
.plot{width:100%;height:100%;overflow:visible}
td.plot-cell{padding:0;width:100%}.columns{columns:440px 2;column-gap:16px;margin-top:14px}
.columns .card{margin-bottom:16px}
@media (min-width:900px){.grid.uneven{grid-template-columns:minmax(0,1.75fr) minmax(0,1fr);
 align-items:start}}
.ridge{height:30px}.range{height:25px}.tall{height:120px}
.axis{position:relative;height:20px;font-size:12px;color:var(--soft);border-top:1px solid
 var(--line)}
.axis span{position:absolute;top:3px;transform:translateX(-50%);white-space:nowrap}
.axis span.first{transform:none}.axis span.last{transform:translateX(-100%)}
.upset td{padding:0}.upset tbody tr:nth-child(odd){background:var(--track)}
.upset .dots{width:1px;padding:0 6px}
.upset td.n{padding:0 12px}.upset td.bar{width:100%}.upset .b{min-width:2px;max-width:720px}
.upset tbody tr td:last-child{padding-right:8px}
.upset thead td,.upset thead th{vertical-align:bottom}
.upset svg text{fill:var(--ink);font-size:12px}
.shots{display:flex;flex-wrap:wrap;gap:8px;margin:0}
.shots figure{margin:0}
.shots img{display:block;height:104px;width:auto;background:#000;border-radius:4px}
.shots figcaption{font-size:12px;color:var(--soft);max-width:160px;overflow-wrap:anywhere}
details{margin-top:10px;font-size:13px}summary{cursor:pointer;color:var(--link)}
details table{margin-top:8px;width:auto}details td,details th{padding:1px 16px 1px 0}
footer{margin-top:48px;padding-top:16px;border-top:1px solid var(--line);color:var(--soft);
 font-size:13px}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--link);
 outline-offset:2px}
@media (max-width:560px){.wrap{padding:0 14px 48px}header{padding-top:24px}h1{font-size:23px}
 .card{padding:14px 12px}.tiles{grid-template-columns:repeat(2,1fr)}.tile dd{font-size:21px}
 td.bar{width:30%;min-width:40px}td.n,th.n{padding-left:9px}table{font-size:14px}
 .axis .opt{display:none}.upset svg{zoom:.82}
 tbody th{padding-right:9px}tbody th>span{max-width:21ch}
 .shots img{height:88px}.upset td.n{padding:0 8px}}
@media print{body{background:#fff;font-size:11px}nav,.download{display:none}.wrap{max-width:none;
 padding:0}.card,.tile{border-color:#bbb}h2{break-after:avoid}
 *{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
""".replace("\n", "")
