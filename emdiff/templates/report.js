(() => {
  "use strict";
  const slider = document.getElementById("iteration");
  const words = document.getElementById("announce");
  if (!slider) return;
  const last = Number(slider.max);
  const name = (k) => (k === 0 ? "start, " : "") + "iteration " + k + " of " + last;
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

  function showFrames(k) {
    each(".gallery", (gallery) => {
      const frames = [...gallery.querySelectorAll(".frame")];
      const shown = frames.filter((frame) => Number(frame.dataset.k) <= k).pop();
      frames.forEach((frame) => { frame.hidden = frame !== shown; });
      gallery.querySelector(".missing").hidden = shown !== undefined;
    });
  }

  function showValues(k) {
    each("[data-history]", (chart) => {
      const now = chart.querySelector(".now");
      now.textContent = "iteration " + k + ": not measured";
      chart.querySelectorAll("g[data-k]").forEach((dot) => {
        const here = Number(dot.dataset.k) === k;
        dot.classList.toggle("here", here);
        if (here) now.textContent = dot.dataset.text;
      });
    });
  }

  function show(k) {
    slider.value = k;
    slider.setAttribute("aria-valuetext", name(k));
    words.textContent = name(k);
    showFrames(k);
    showValues(k);
  }

  slider.addEventListener("input", () => show(Number(slider.value)));
  each("[data-step]", (button) => button.addEventListener("click", () => {
    show(Math.min(last, Math.max(0, Number(slider.value) + Number(button.dataset.step))));
  }));
  window.addEventListener("beforeprint", () => show(last));
  show(last);
})();
