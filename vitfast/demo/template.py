"""The demo's page, as jinja2 takes it: what stands where, in light and in dark, from 320 pixels."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitfast demo</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2733; --muted: #5a6470;
        --line: #e1e5ea; --panel: #f4f6f8; --timm: #a9b2bd; --vitfast: #1f8a5f; --good: #1a7350;
        --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
:root { --paper: #12171d; --ink: #e4e9ef; --muted: #9aa6b2; --line: #2b343e; --panel: #1b222a;
        --timm: #5d6873; --vitfast: #2fae7c; --good: #4fcb98; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: 6px; }
figure { margin: 0; }
figcaption, .muted { color: var(--muted); font-size: .875rem; }
.verdict { font-weight: 600; }
.head { display: flex; flex-wrap: wrap; gap: 1.5rem; justify-content: space-between; }
.head > div { flex: 1 1 20rem; min-width: 0; }
.head img { max-width: 9rem; }
.grid { display: grid; gap: 1rem 2rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.cards { display: grid; gap: .75rem;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .5rem; font-size: .875rem; }
.pair { display: flex; gap: .5rem; align-items: center; height: 6rem; }
.pair img { max-height: 100%; max-width: 46%; }
.bars { margin: 0 0 .75rem; font-size: .875rem; }
.bar { display: flex; align-items: center; gap: .5rem; margin: .15rem 0; }
.bar .track { flex: 1 1 auto; }
.bar .fill { height: .9rem; border-radius: 2px; }
.bar .value { flex: 0 0 8.5rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.timm { background: var(--timm); }
.vitfast { background: var(--vitfast); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .75rem .45rem 0; text-align: right; vertical-align: top;
         white-space: nowrap; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--muted); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
pre { font-size: .8rem; overflow-x: auto; background: var(--panel); padding: .75rem; }
</style>
</head>
<body>
<main>
{% macro bars(title, rows) %}<div class="bars"><div>{{ title }}</div>
{% for who, share, text in rows %}<div class="bar"><div class="track">
<div class="fill {{ who }}" style="width: {{ "%.1f"|format(share) }}%"></div></div>
<div class="value">{{ who }} {{ text }}</div></div>
{% endfor %}</div>{% endmacro %}
{% macro why(notes) %}{% for reason in notes.reasons %}<p class="muted"><sup>{{ loop.index }}</sup>
{{ reason }}.</p>{% endfor %}{% endmacro %}
<div class="head">
<div>
<h1>timm beside vitfast</h1>
<p class="verdict">{{ verdict }}</p>
<p>Same weights, same photograph, one process, taking turns.</p>
<p class="muted">{{ where }}</p>
<p class="muted">{{ versions }}; {{ weights }}</p>
<p class="muted">{{ created }}; <code>{{ command }}</code></p>
</div>
{% if photo %}<figure><img src="{{ photo }}" alt="{{ credit }}">
<figcaption>{{ credit }}</figcaption></figure>{% endif %}
</div>

{% if outcomes %}
<h2>Speed and memory</h2>
<div class="grid">
<div><h3>Time of one image, the longer = 100 %</h3>
{% for o in outcomes %}{{ bars(o.title, time_bars(o)) }}{% endfor %}</div>
<div><h3>Peak memory of one image, the larger = 100 %</h3>
{% for o in outcomes %}{{ bars(o.title, memory_bars(o)) }}{% endfor %}</div>
</div>
<div class="scroll"><table id="speed">
<tr><th>model</th><th>dtype</th><th>timm</th><th>vitfast</th><th>times as fast</th>
<th>memory, timm</th><th>memory, vitfast</th><th>error / budget</th><th>top-5</th></tr>
{% for o in outcomes %}<tr>
<td>{{ o.title }}</td><td>{{ o.dtype }}</td>
<td>{{ ms(o.timm_ms) }}<small>{{ spread(o, o.timm_quartiles_ms) }}</small></td>
<td>{{ ms(o.vitfast_ms) }}<small>{{ spread(o, o.vitfast_quartiles_ms) }}</small></td>
<td class="{{ {"faster": "good", "slower": "bad"}.get(o.pace, "muted") }}">{{ digits(o.ratio) }}x
<small>{{ o.pace }}</small></td>
<td>{{ memory(o, o.timm_mb) }}</td><td>{{ memory(o, o.vitfast_mb) }}</td>
<td class="{{ 'good' if o.within_budget else 'bad' }}">
{{ "%.1e"|format(o.error) }} / {{ "%.1e"|format(o.budget) }}</td>
<td>{{ agreement(o) }}</td>
</tr>{% endfor %}
</table></div>
{{ why(notes) }}
<p class="muted">Medians of interleaved runs, below them the 25th to the 75th percentile; "level":
these overlap. Memory: the peak of inference, weights included, each in a process of its own with
random weights. Errors are in the unit of the model's output.</p>
{% for o in outcomes %}<p class="muted">{{ o.title }}:
{{ o.rounds }} {{ "round" if o.rounds == 1 else "rounds" }};
budget: {{ o.budget_from }}.</p>{% endfor %}
{% endif %}
{% for f in failures %}<p class="bad">{{ f.title }} failed: {{ f.reason }}</p>{% endfor %}

{% if large %}
<h2>A large photograph</h2>
{% if large is string %}<p class="bad">Failed: {{ large }}</p>{% else %}
<p class="verdict">{{ large.sentence() }}</p>
<p class="muted">{{ large.how }}.</p>
<div class="scroll"><table id="large">
<tr><th>way</th><th>time</th><th>peak memory</th><th>apart from vitfast's one shot</th></tr>
{% for way in large.ways %}<tr><td>{{ way.name }}</td><td>{{ way_time(way) }}</td>
<td>{{ way_memory(way) }}</td><td>{{ way_apart(way) }}</td></tr>{% endfor %}
</table></div>
{{ why(large_notes) }}
<p class="muted">Time: median of the calls, each from uint8 pixels to the last feature map. Memory:
the peak of a process of its own, with weights, photograph and features. Apart: the Euclidean norm
of the difference over that of the features; a tile sees no further than its edges, so that tiles
and one shot differ by more than rounding.</p>
<div class="grid">
<figure><img src="{{ picture(large.photo) }}" alt="The photograph"><figcaption>What the model
is given, {{ large.photo.width }} x {{ large.photo.height }} pixels, shown smaller</figcaption>
</figure>
{% for key, image in large.pictures.items() %}<figure><img src="{{ picture(image, 480) }}"
alt="Features of {{ large.way(key).name }}"><figcaption>Features of {{ large.way(key).name }},
{{ image.width }} x {{ image.height }} cells: the three directions in which they vary most, as
colours</figcaption></figure>{% endfor %}
</div>
{% endif %}{% endif %}

{% if attention %}
<h2>What a model attends to</h2>
{% if attention is string %}<p class="bad">Failed: {{ attention }}</p>{% else %}
<figure><img src="{{ picture(attention.picture, 0, 760) }}"
alt="Attention map of {{ attention.model }} over the photograph">
<figcaption>{{ attention.how }}; attention from least (dark blue) to most (yellow).</figcaption>
</figure>
<p>{{ attention.sentence() }}</p>
{% endif %}{% endif %}

{% if duplicates %}
<h2>Near-duplicates</h2>
{% if duplicates is string %}<p class="bad">Failed: {{ duplicates }}</p>{% else %}
<p class="verdict">{{ duplicates.sentence() }}</p>
<p class="muted">Left the copy, right what came first; the cosine of their vectors, and that of the
second.</p>
<div class="cards">
{% for q in duplicates.queries %}<div class="card"><div class="pair">
<img src="{{ picture(q.image, 0, 128) }}"
 alt="{{ duplicates.photos[q.original].name }}, {{ q.distortion }}">
<img src="{{ picture(duplicates.photos[q.found].image, 0, 128) }}"
 alt="found first: {{ duplicates.photos[q.found].name }}"></div>
{{ q.distortion }}<br><span class="{{ 'good' if q.right else 'bad' }}">
{{ "its original" if q.right else "another" }}</span>
<span class="muted">cosine {{ "%.3f"|format(q.score) }},
next {{ "%.3f"|format(q.runner_up) }}</span>
</div>
{% endfor %}</div>
<p class="muted">Photographs: {{ duplicates.photos|map(attribute="credit")|join(". ") }}.</p>
{% endif %}{% endif %}

{% for o in outcomes if o.labels %}{% if loop.first %}<h2>What the models see</h2>{% endif %}
<p>{{ o.title }}: {% for label, chance in o.labels %}{{ label }}
<span class="muted">{{ "%.0f"|format(100 * chance) }} %</span>{{ "" if loop.last else ", " }}
{% endfor %}</p>{% endfor %}

{% for o in outcomes %}{% if loop.first %}<h2>What was swapped</h2>{% endif %}
<details><summary>{{ o.title }}: {{ o.swapped_classes() }}</summary>
<pre>{{ o.report }}</pre></details>{% endfor %}
</main>
</body>
</html>
"""
