// Shows the values of the mark nearest to the pointer, or chosen with the arrow keys.
for (const chart of document.querySelectorAll("svg.chart")) {
  const marks = JSON.parse(chart.dataset.marks), along = chart.dataset.along === "y" ? 1 : 0;
  const layer = chart.querySelector(".hover"), box = chart.viewBox.baseVal;
  let chosen = -1;
  const add = (name, attributes, text) => {
    const element = document.createElementNS(chart.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    layer.append(element);
    return element;
  };
  const show = (index) => {
    if (!marks.length) return;
    chosen = Math.max(0, Math.min(marks.length - 1, index));
    const [x, y, first, second] = marks[chosen];
    layer.replaceChildren();
    if (!along) add("line", { class: "cursor", x1: x, x2: x, y1: 14, y2: box.height - 40 });
    add("circle", { class: "spot", cx: x, cy: y, r: 4.5 });
    const width = 14 + 6.6 * Math.max(first.length, second.length);
    const left = Math.max(2, Math.min(box.width - width - 2, x > box.width / 2 ? x - width - 9 : x + 9));
    const top = Math.max(2, Math.min(box.height - 42, y - 48));
    add("rect", { class: "tip", x: left, y: top, width, height: 38, rx: 5 });
    add("text", { class: "said", x: left + 7, y: top + 15 }, first);
    add("text", { class: "said strong", x: left + 7, y: top + 30 }, second);
  };
  const hide = () => { chosen = -1; layer.replaceChildren(); };
  chart.addEventListener("pointermove", (event) => {
    const area = chart.getBoundingClientRect();
    const at = along ? (event.clientY - area.top) / area.height * box.height
                     : (event.clientX - area.left) / area.width * box.width;
    let best = 0;
    marks.forEach((mark, index) => {
      if (Math.abs(mark[along] - at) < Math.abs(marks[best][along] - at)) best = index;
    });
    show(best);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (move === undefined) return;
    event.preventDefault();
    show(chosen < 0 ? 0 : chosen + move);
  });
}
