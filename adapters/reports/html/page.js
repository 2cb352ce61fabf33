"use strict";
(() => {
  const root = document.documentElement;
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);

  // Names in charts are taken for a little HTML: from files, none is wanted.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, most) => plain(text.length > most ? `…${text.slice(1 - most)}` : text);
  const digits = (value) => (value === null ? "not known" : String(Number(value.toPrecision(3))));
  const told = (value) => (data.relative && value !== null ? `${digits(100 * value)} %` : digits(value));

  // Light and dark

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
  const probe = document.createElement("span");
  document.body.append(probe);
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  find("theme").addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    draw();
  });
  dark.addEventListener("change", () => draw());

  // The tree

  const all = (open) => () => find("tree").querySelectorAll("details").forEach((one) => { one.open = open; });
  find("open-all").addEventListener("click", all(true));
  find("close-all").addEventListener("click", all(false));
  find("untouched")?.addEventListener("change", (event) => find("tree").classList.toggle("everything", event.target.checked));

  // Tables

  const compare = new Intl.Collator("en", { numeric: true }).compare;
  for (const table of document.querySelectorAll(".sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const sort = (column) => {
      const down = heads[column].getAttribute("aria-sort") === "ascending";
      for (const head of heads) head.removeAttribute("aria-sort");
      heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => {
        const { value } = row.cells[column].dataset;
        return { row, value: value === undefined ? row.cells[column].textContent : value === "" ? null : Number(value) };
      });
      rows.sort((a, b) => {
        if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
        const order = typeof a.value === "number" ? a.value - b.value : compare(a.value, b.value);
        return down ? -order : order;
      });
      body.append(...rows.map(({ row }) => row));
    };
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(column)));
  }
  find("filter").addEventListener("input", ({ target }) => {
    let wanted;
    try {
      const pattern = new RegExp(target.value, "i");
      wanted = (text) => pattern.test(text);
    } catch {
      wanted = (text) => text.includes(target.value);
    }
    let count = 0;
    for (const row of find("table").tBodies[0].rows) {
      row.hidden = !wanted(row.textContent);
      count += !row.hidden;
    }
    find("count").value = `${count.toLocaleString("en")} ${count === 1 ? "row" : "rows"}`;
  });

  // Charts

  // Okabe and Ito's, of which the light ones go first on a dark ground.
  const LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  const lineOf = (number) => (isDark() ? [...LINES].reverse() : LINES)[number % LINES.length];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "cross"];
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("muted") },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    dragmode: false,
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...more,
  });
  const axis = (title, more) => ({
    title: { text: title, standoff: 8 },
    gridcolor: colour("line"),
    linecolor: colour("line"),
    zeroline: false,
    automargin: true,
    fixedrange: true,
    ...more,
  });

  // Blocks that differ in their number only are called by it.
  const numbers = data.blocks.map((block) => block.match(/^(.*?)(\d+)$/));
  const fronts = new Set(numbers.filter((match) => match).map((match) => match[1]));
  const alike = fronts.size === 1 && numbers.every((match, number) => match || !data.blocks[number]);
  const columns = data.blocks.map((block, number) => (block ? (alike ? numbers[number][2] : block) : "other"));
  const across = alike ? short([...fronts][0].replace(/\.$/, ""), 40) : "";

  function map(id, values, scale, text) {
    const blank = () => data.kinds.map(() => data.blocks.map(() => null));
    const [cells, names] = [blank(), blank()];
    data.grid.forEach(([block, kind], layer) => {
      const value = values(layer);
      if (value === null) return;
      cells[kind][block] = scale.place ? scale.place(value) : value;
      names[kind][block] = `${plain(data.paths[layer])}<br><b>${text(value)}</b>`;
    });
    const narrow = find(id).clientWidth < 500;
    Plotly.react(find(id), [{
      type: "heatmap",
      z: cells,
      text: names,
      hovertemplate: "%{text}<extra></extra>",
      hoverongaps: false,
      xgap: data.blocks.length > 60 ? 0 : 2,
      ygap: 2,
      colorscale: scale.colours,
      zmin: scale.from,
      zmax: scale.to,
      colorbar: {
        thickness: 10,
        outlinewidth: 0,
        tickangle: 0,
        tickvals: scale.ticks.map((value) => (scale.place ? scale.place(value) : value)),
        ticktext: scale.ticks.map(text),
        len: 1,
        ...(narrow ? { orientation: "h", y: 1.02, yanchor: "bottom" } : {}),
      },
    }], layout({
      height: Math.max(220, 110 + 26 * data.kinds.length + (narrow ? 40 : 0)),
      xaxis: axis(across, { tickvals: columns.map((_, number) => number), ticktext: columns.map((name) => short(name, narrow ? 10 : 18)), showgrid: false, ...(columns.length > 40 ? { tickmode: "auto", nticks: 20, showticklabels: alike } : {}) }),
      yaxis: axis("", { tickvals: data.kinds.map((_, number) => number), ticktext: data.kinds.map((name) => short(name, narrow ? 16 : 40)), autorange: "reversed", showgrid: false }),
    }), config);
  }

  const steps = () => [0, 1, 2, 3, 4, 5, 6, 7, 8].map((step) => [step / 8, colour(`step-${step}`)]);

  function drawMap() {
    const which = find("map-value").value;
    const own = data[which][Number(find("map-adapter")?.value ?? 0)];
    const sized = which === "sizes";
    const most = Math.max(...data[which].flat().filter((value) => value !== null), 0);
    const ticks = [0, most / 4, most];
    const scale = sized
      ? { colours: steps(), from: 0, to: Math.sqrt(most) || 1, place: Math.sqrt, ticks } // As the tree has them.
      : { colours: steps(), from: 0, to: most || 1, ticks: [0, most / 2, most] };
    map("map", (layer) => own[layer], scale, sized ? told : digits);
  }

  function drawPairs() {
    const pair = data.overlaps[Number(find("pair").value)];
    const which = Number(find("pair-value").value);
    const scale = which
      ? { colours: steps(), from: 0, to: 1, ticks: [0, 0.5, 1] }
      : { colours: [[0, "#E66100"], [0.5, colour("hover")], [1, "#1A85FF"]], from: -1, to: 1, ticks: [-1, 0, 1] };
    map("pairs", (layer) => pair.layers[layer]?.[which] ?? null, scale, digits);
  }

  const falling = (values) => values.map((value) => value / values[0]);
  const quantile = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];

  // What nine in ten layers have, at each place of their spectra.
  function band(spectra) {
    const longest = Math.max(...spectra.map((values) => values.length));
    const places = [];
    for (let place = 0; place < longest; place += 1) {
      const there = spectra.filter((values) => values.length > place).map((values) => values[place] / values[0]).sort((a, b) => a - b);
      places.push([place + 1, quantile(there, 0.05), quantile(there, 0.95)]);
    }
    return places;
  }

  function drawSpectrum() {
    const layer = Number(find("spectrum-layer").value);
    const single = data.adapters.length === 1;
    const lines = data.adapters.map((name, number) => ({
      type: "scatter",
      mode: "lines+markers",
      name: short(name, 30),
      x: data.spectra[number][layer].map((_, place) => place + 1),
      y: falling(data.spectra[number][layer]),
      line: { color: lineOf(number), dash: DASHES[number % DASHES.length], width: 2 },
      marker: { symbol: MARKERS[number % MARKERS.length], size: 6 },
      hovertemplate: "σ<sub>%{x}</sub> / σ<sub>1</sub> = %{y:.3~g}<extra></extra>",
      showlegend: !single,
    })).filter((line) => line.x.length);
    if (single) {
      const places = band(data.spectra[0].filter((values) => values.length));
      const x = places.map(([place]) => place);
      const quiet = { type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      lines.unshift(
        { ...quiet, x, y: places.map(([, low]) => low), showlegend: false },
        { ...quiet, x, y: places.map(([, , high]) => high), fill: "tonexty", fillcolor: isDark() ? "rgba(122,184,255,0.16)" : "rgba(11,92,173,0.12)", name: "nine in ten layers" },
      );
    }
    const longest = Math.max(1, ...lines.map((line) => line.x.length));
    Plotly.react(find("spectrum"), lines, layout({
      height: 320,
      xaxis: axis("singular value", longest < 13 ? { dtick: 1 } : {}),
      yaxis: axis("σᵢ/σ₁", { type: "log", dtick: "D2", tickformat: "~g" }),
    }), config);
  }

  function drawRanks() {
    const used = data.paths.map((_, layer) => layer).filter((layer) => data.ranks.some((own) => own[layer] !== null));
    Plotly.react(find("ranks"), data.adapters.map((name, number) => ({
      type: "scatter",
      mode: "markers",
      name: short(name, 30),
      x: used.map((_, place) => place + 1),
      y: used.map((layer) => data.ranks[number][layer]),
      text: used.map((layer) => plain(data.paths[layer])),
      marker: { color: lineOf(number), symbol: MARKERS[number % MARKERS.length], size: used.length > 200 ? 5 : 8 },
      hovertemplate: "%{text}<br><b>%{y:.3~g}</b><extra></extra>",
      showlegend: data.adapters.length > 1,
    })), layout({ height: 300, xaxis: axis("layer, in order"), yaxis: axis("effective rank", { rangemode: "tozero" }) }), config);
  }

  function draw() {
    if (find("map")) {
      drawMap();
      drawSpectrum();
      drawRanks();
    }
    if (find("pairs")) drawPairs();
  }

  if (find("spectrum-layer")) {
    data.paths.forEach((path, layer) => {
      if (data.spectra.some((own) => own[layer].length)) find("spectrum-layer").add(new Option(path, layer));
    });
  }
  const changes = { "map-adapter": drawMap, "map-value": drawMap, "spectrum-layer": drawSpectrum, pair: drawPairs, "pair-value": drawPairs };
  for (const [id, redraw] of Object.entries(changes)) find(id)?.addEventListener("change", redraw);
  draw();
})();
