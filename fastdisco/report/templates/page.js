// Hover, linking and the calls of uPlot; what is shown stands in the page's JSON.
(() => {
  "use strict";
  const root = document.documentElement;
  const read = (id) => JSON.parse(document.getElementById("data-" + id).textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const names = read("runs");

  // ---- lines

  const charts = [];

  function marks(figure) {
    return {
      hooks: {
        draw: (u) => {
          const { ctx, bbox } = u;
          ctx.save();
          ctx.setLineDash([4, 4]);
          for (const mark of figure.marks) {
            ctx.strokeStyle = colour("c" + (mark.run % 6));
            for (const x of mark.x) {
              const at = u.valToPos(x, "x", true);
              ctx.beginPath();
              ctx.moveTo(at, bbox.top);
              ctx.lineTo(at, bbox.top + bbox.height);
              ctx.stroke();
            }
          }
          ctx.restore();
        },
      },
    };
  }

  // A single point stands at its place between 0 and a little beyond.
  const range = (u, low, high) => (low === high ? [0, 1.1 * high || 1] : [low, high]);

  function draw(box) {
    const figure = read(box.dataset.chart);
    const axis = { stroke: colour("soft"), grid: { stroke: colour("rule"), width: 1 }, ticks: { stroke: colour("rule"), width: 1 } };
    const series = figure.lines.map((line) => ({
      label: names[line.run],
      stroke: colour("c" + (line.run % 6)),
      width: 1.5,
      spanGaps: true,
      points: { show: line.x.length < 40, size: line.x.length > 1 ? 4 : 8, fill: colour("c" + (line.run % 6)) },
    }));
    const options = {
      width: box.clientWidth,
      height: 180,
      scales: { x: { time: false, range } },
      axes: [axis, { ...axis, size: 62 }],
      series: [{ label: figure.axis }, ...series],
      cursor: { sync: { key: figure.axis }, drag: { x: true, y: false } },
      plugins: [marks(figure)],
    };
    box.replaceChildren();
    return new uPlot(options, uPlot.join(figure.lines.map((line) => [line.x, line.y])), box);
  }

  const boxes = [...document.querySelectorAll(".chart")];
  const drawAll = () => boxes.forEach((box, i) => { charts[i]?.destroy(); charts[i] = draw(box); });
  drawAll();
  new ResizeObserver(() => {
    boxes.forEach((box, i) => {
      if (charts[i].width !== box.clientWidth) charts[i].setSize({ width: box.clientWidth, height: 180 });
    });
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Paper is light whatever the screen is.
  addEventListener("beforeprint", () => { root.classList.add("printed"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("printed"); drawAll(); });

  // ---- maps: the same image in all

  const tip = document.getElementById("tip");
  const circles = [...document.querySelectorAll(".map circle")];
  let shown = null;
  let images = null;

  function link(i) {
    for (const c of circles) c.classList.toggle("on", c.dataset.i === i);
    shown = i;
  }

  function tell(i, event) {
    images ??= read("maps");
    const image = images.images[i];
    const [picture, text] = tip.children;
    picture.hidden = image.tile === null;
    if (image.tile !== null) {
      picture.style.backgroundPosition =
        -(image.tile % root.dataset.columns) * root.dataset.side + "px " +
        -Math.floor(image.tile / root.dataset.columns) * root.dataset.side + "px";
    }
    const found = images.classes.find((c) => c.label === image.label);
    text.textContent = " " + found.name + ", " + image.name;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4) + "px";
    tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4) + "px";
  }

  document.addEventListener("pointerover", (event) => {
    const i = event.target.closest?.(".map circle")?.dataset.i ?? null;
    if (i !== shown) link(i);
    if (i === null) tip.hidden = true;
    else tell(i, event);
  });

  // ---- copy data

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // A page from a file may have no clipboard of its own.
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      await copy(document.getElementById("data-" + button.dataset.copy).textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy data"; }, 1500);
    });
  }
})();
