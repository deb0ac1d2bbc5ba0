// The player of an animated picture, for any page or notebook: `(id, frames, labels, interval)`, where a frame is a
// light and a dark image. Without it the last frame stands still. Readers who ask for less motion get no play
// button; the slider stays.
((id, frames, labels, interval) => {
  const root = document.getElementById(id);
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  const images = root.querySelectorAll("img"), controls = root.querySelector(".imsvd-controls");
  const button = root.querySelector("button"), slider = root.querySelector("input");
  const output = root.querySelector("output");
  let timer = null;
  const go = (k) => {
    slider.value = k;
    images.forEach((image, theme) => { image.src = frames[k][theme]; });
    output.textContent = labels[k];
    slider.setAttribute("aria-valuetext", labels[k]);
  };
  const name = (text, sign) => { button.setAttribute("aria-label", text); button.textContent = sign; };
  const stop = () => { clearInterval(timer); timer = null; name("Play", "\u25B6\uFE0E"); };
  const step = () => (+slider.value < frames.length - 1 ? go(+slider.value + 1) : stop());
  const play = () => {
    if (+slider.value === frames.length - 1) go(0);
    timer = setInterval(step, interval);
    name("Pause", "\u275A\u275A");
  };
  button.addEventListener("click", () => (timer === null ? play() : stop()));
  slider.addEventListener("input", () => { stop(); go(+slider.value); });
  button.hidden = matchMedia("(prefers-reduced-motion: reduce)").matches;
  controls.style.display = "flex";
  go(frames.length - 1);
})
