"use strict";
// The page is whole without this: it adds what is near the pointer, walking with the arrow keys, and copies.
const words = document.body.dataset;

function pointsOf(chart) {
  return [...chart.querySelectorAll(".p,.bar")].filter((point) => point.dataset.says && point.getClientRects().length);
}

function middleOf(point) {
  const box = point.getBoundingClientRect();
  return point.classList.contains("bar") ? [box.right, (box.top + box.bottom) / 2] : [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
}

for (const charts of document.querySelectorAll(".charts")) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  charts.append(tip);
  let here = null;

  const hide = () => {
    here?.classList.remove("here");
    here = null;
    tip.hidden = true;
  };
  const show = (point) => {
    if (point === here) return;
    hide();
    here = point;
    point.classList.add("here");
    tip.textContent = point.dataset.says;
    tip.hidden = false;
    const [x, y] = middleOf(point);
    const around = charts.getBoundingClientRect();
    const right = x - around.left + 14;
    const left = x - around.left - 14 - tip.offsetWidth;
    const fits = right + tip.offsetWidth <= around.width;
    tip.style.left = `${Math.max(0, fits ? right : left >= 0 ? left : around.width - tip.offsetWidth)}px`;
    // Where there is no room on either side, above or below the point, so that it is not covered.
    const beside = fits || left >= 0;
    const top = y - around.top - (beside ? tip.offsetHeight / 2 : tip.offsetHeight + 12);
    tip.style.top = `${top >= 0 || beside ? Math.max(0, top) : y - around.top + 12}px`;
  };

  document.addEventListener("pointerdown", (event) => charts.contains(event.target) || hide());
  for (const chart of charts.querySelectorAll(".chart")) {
    chart.tabIndex = 0;
    for (const point of chart.querySelectorAll(".p,.bar")) {
      const title = point.querySelector("title");
      if (!title) continue;
      point.dataset.says = title.textContent;
      point.setAttribute("role", "img");
      point.setAttribute("aria-label", title.textContent);
      point.setAttribute("tabindex", "-1");
      title.remove(); // the browser would show it as well
    }
    const nearest = (event) => {
      let best = null;
      let least = 40 * 40;
      for (const point of pointsOf(chart)) {
        const [x, y] = middleOf(point);
        const far = (x - event.clientX) ** 2 + (y - event.clientY) ** 2;
        const inside = point.classList.contains("bar") && point.matches(":hover");
        if (inside || far < least) [best, least] = [point, inside ? -1 : far];
      }
      if (best) show(best);
      else hide();
    };
    chart.addEventListener("pointermove", nearest);
    chart.addEventListener("pointerdown", nearest);
    // A finger leaves when it is lifted: what it pointed at stays until it points at something else.
    chart.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hide());
    chart.addEventListener("focusout", (event) => charts.contains(event.relatedTarget) || hide());
    chart.addEventListener("keydown", (event) => {
      const target = next(pointsOf(chart), here, event.key);
      if (event.key === "Escape") {
        hide();
        chart.focus();
      } else if (target) {
        event.preventDefault();
        target.focus({ preventScroll: true });
        show(target);
      }
    });
  }
}

// Left and right go along a series, up and down to the nearest point of the one before or after.
function next(points, here, key) {
  if (!points.length) return null;
  const index = points.indexOf(here);
  if (key === "Home" || (index < 0 && key.startsWith("Arrow"))) return points[0];
  if (key === "End") return points.at(-1);
  if (key === "ArrowRight") return points[Math.min(index + 1, points.length - 1)];
  if (key === "ArrowLeft") return points[Math.max(index - 1, 0)];
  if (key !== "ArrowDown" && key !== "ArrowUp") return null;
  const groups = [...new Set(points.map((point) => point.parentNode))];
  const group = groups[groups.indexOf(here.parentNode) + (key === "ArrowDown" ? 1 : -1)];
  if (!group) return here;
  const x = middleOf(here)[0];
  const far = (point) => Math.abs(middleOf(point)[0] - x);
  return points.filter((point) => point.parentNode === group).reduce((a, b) => (far(b) < far(a) ? b : a));
}

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", () => action(made));
  return made;
}

for (const details of document.querySelectorAll("details")) {
  const table = details.querySelector("table");
  const save = () => {
    const quoted = (cell) => `"${cell.textContent.trim().replaceAll('"', '""')}"`;
    const lines = [...table.rows].map((row) => [...row.cells].map(quoted).join(","));
    const link = document.createElement("a");
    link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(`\ufeff${lines.join("\r\n")}\r\n`)}`;
    link.download = `${details.dataset.name}.csv`;
    link.click();
  };
  details.append(button(words.save, save));
}

for (const command of document.querySelectorAll(".command")) {
  const copy = (made) => {
    getSelection().selectAllChildren(command);
    made.textContent = document.execCommand("copy") ? words.copied : words.copy;
    getSelection().removeAllRanges();
  };
  const around = document.createElement("div");
  around.className = "copied";
  command.replaceWith(around);
  around.append(command, button(words.copy, copy));
}
