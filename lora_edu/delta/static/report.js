// Moves what the page holds already: no kernel, no network. The numbers come from the JSON in the page, names are only
// ever put in as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("rank"), kinds = document.getElementById("kind");
  const shown = document.getElementById("rank-value"), summary = document.getElementById("summary");
  const rows = [...document.querySelectorAll("tbody tr")];
  const plot = document.getElementById("plot"), sentence = document.getElementById("sentence");
  const title = document.getElementById("chosen");
  let chosen = 0;

  for (const each of data.matrices) each.ranks = data.ranks.filter((k) => k < each.last).concat(each.last);

  const percent = (share) =>
    share >= 1 ? "100 %" : `${Number(Math.min(100 * share, 99.9).toPrecision(3))} %`;
  const whole = (number) => Math.round(number).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
  function kept(each, rank) {
    let share = 0;
    each.ranks.forEach((k, index) => { if (k <= rank) share = each.energy[index]; });
    return share;
  }
  const svg = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const scale = (low, high, from, to) => (value) =>
    from + (to - from) * (Math.log(value / low) / (Math.log(high / low) || 1));
  const visible = (each) => each.sigma.map((s, index) => [each.ranks[index], s]).filter(([, s]) => s > 0);

  function spark(each) {
    const points = visible(each), picture = svg("svg", { viewBox: "0 0 90 26", "aria-hidden": "true" });
    if (!points.length) return picture;
    const top = points[0][1], bottom = Math.max(Math.min(...points.map(([, s]) => s), each.floor || top), top * 1e-4);
    const x = scale(1, Math.max(each.last, 2), 2, 88), y = scale(bottom, top, 24, 2);
    const at = points.map(([k, s]) => `${x(k).toFixed(1)},${Math.min(y(s), 25).toFixed(1)}`);
    picture.append(svg("polyline", { class: "spark", points: at.join(" ") }));
    if (each.floor > bottom && each.floor < top) {
      picture.append(svg("line", { class: "floor", x1: 2, x2: 88, y1: y(each.floor), y2: y(each.floor) }));
    }
    return picture;
  }

  function draw(each, rank) {
    const points = visible(each);
    plot.replaceChildren();
    title.textContent = each.name;
    const told = kept(each, rank);
    let words = `${each.name}, ${each.rows} × ${each.columns}: rank ${Math.min(rank, each.last)} keeps `
      + `${percent(told)} of ‖ΔW‖².`;
    if (each.above !== null) words += ` ${each.above} of its singular values ${data.above}.`;
    sentence.textContent = words;
    plot.setAttribute("aria-label", words);
    if (!points.length) return;
    const least = Math.min(...points.map(([, s]) => s)), top = Math.max(points[0][1], each.floor || 0) * 1.3;
    const bottom = Math.max(Math.min(least, each.floor || least), top * 1e-7) / 1.3;
    const x = scale(1, Math.max(each.last, 2), 62, 704), y = scale(bottom, top, 282, 12);
    const steps = top / bottom > 300 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(bottom)); power <= Math.log10(top); power += 1) {
      for (const tick of steps.map((step) => step * 10 ** power)) {
        if (tick < bottom || tick > top) continue;
        plot.append(svg("line", { class: "grid", x1: 62, x2: 704, y1: y(tick), y2: y(tick) }));
        const plain = power >= -3 && power <= 3;
        const text = plain ? String(Number(tick.toPrecision(2))) : tick.toExponential(0).replace("+", "");
        plot.append(svg("text", { x: 56, y: y(tick) + 4, "text-anchor": "end" }, text));
      }
    }
    for (let k = 1; k <= Math.max(each.last, 2); k *= 2) {
      plot.append(svg("line", { class: "grid", x1: x(k), x2: x(k), y1: 12, y2: 282 }));
      plot.append(svg("text", { x: x(k), y: 299, "text-anchor": "middle" }, k));
    }
    plot.append(svg("text", { x: 383, y: 317, "text-anchor": "middle" }, "k, number of the singular value"));
    plot.append(svg("text", { x: 14, y: 147, transform: "rotate(-90 14 147)", "text-anchor": "middle" }, "σₖ of ΔW"));
    const at = points.map(([k, s]) => `${x(k).toFixed(1)},${y(s).toFixed(1)}`);
    plot.append(svg("polyline", { class: "curve", points: at.join(" ") }));
    if (each.floor) {
      plot.append(svg("line", { class: "floor", x1: 62, x2: 704, y1: y(each.floor), y2: y(each.floor) }));
      const beside = y(each.floor) > 30 ? -6 : 16;
      plot.append(svg("text", { class: "floor-name", x: 700, y: y(each.floor) + beside, "text-anchor": "end" }, data.line));
    }
    for (const [k, s] of points) {
      plot.append(svg("circle", { class: k <= rank ? "kept" : "dropped", cx: x(k), cy: y(s), r: 3.2 }));
    }
    const edge = x(Math.min(rank, each.last));
    plot.append(svg("line", { class: "cut", x1: edge, x2: edge, y1: 12, y2: 282 }));
  }

  function update() {
    const rank = data.ranks[Number(slider.value)];
    let energy = 0, total = 0, parameters = 0, full = 0, count = 0;
    data.matrices.forEach((each, index) => {
      const share = kept(each, rank), there = !kinds.value || kinds.value === each.kind;
      rows[index].hidden = !there;
      rows[index].querySelector(".bar i").style.width = `${100 * share}%`;
      rows[index].querySelector(".share").textContent = percent(share);
      if (!there) return;
      count += 1;
      energy += share * each.norm ** 2;
      total += each.norm ** 2;
      parameters += each.copies * Math.min(rank, each.last) * (each.rows + each.columns);
      full += each.copies * each.rows * each.columns;
    });
    shown.textContent = rank;
    slider.setAttribute("aria-valuetext", `rank ${rank}`);
    summary.textContent = `Rank ${rank} in ${count === 1 ? "this matrix" : `these ${whole(count)} matrices`} keeps `
      + `${total ? percent(energy / total) : "0 %"} of all ‖ΔW‖² together, in ${whole(parameters)} parameters: `
      + `${percent(parameters / full)} of what the matrices have.`;
    draw(data.matrices[chosen], rank);
  }

  rows.forEach((row, index) => {
    row.querySelector(".spectrum").append(spark(data.matrices[index]));
    row.querySelector("button").addEventListener("click", (event) => {
      rows[chosen].querySelector("button").setAttribute("aria-pressed", "false");
      chosen = index;
      row.querySelector("button").setAttribute("aria-pressed", "true");
      update();
      if (event.isTrusted) title.scrollIntoView();
    });
  });
  slider.max = data.ranks.length - 1;
  slider.value = Math.max(data.ranks.findIndex((k) => k >= data.start), 0);
  slider.addEventListener("input", update);
  kinds.addEventListener("change", () => {
    const first = data.matrices.findIndex((each) => !kinds.value || each.kind === kinds.value);
    rows[first].querySelector("button").click();
  });
  document.documentElement.classList.add("alive");
  rows[0].querySelector("button").click();
})();
