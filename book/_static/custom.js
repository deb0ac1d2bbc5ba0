// What the theme leaves open: tab stops for all that scrolls sideways, pictures that can be enlarged, search without TeX.
document.addEventListener("DOMContentLoaded", () => {
  // A region gets its tab stop when it scrolls, which may be after a fold was opened or the window turned.
  const sizes = new ResizeObserver((regions) => {
    for (const { target } of regions) {
      if (target.scrollWidth > target.clientWidth + 1) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  const watch = () => document
    .querySelectorAll(".bd-article :is(pre, div.math, mjx-container[display], .pst-scrollable-table-container, .output)")
    .forEach((region) => sizes.observe(region));
  watch();
  window.MathJax?.startup?.promise?.then(watch);
  addEventListener("load", () => window.MathJax?.startup?.promise?.then(watch));

  // A tap on a picture, or its button, shows it as large as it is drawn or larger.
  const dialog = document.createElement("dialog");
  dialog.className = "imsvd-enlarged";
  dialog.setAttribute("aria-label", "Enlarged picture");
  dialog.innerHTML = '<button type="button" aria-label="Close">×</button>';
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  for (const figure of document.querySelectorAll(".bd-article .imsvd-figure")) {
    const images = [...figure.querySelectorAll("img")];
    const enlarge = () => {
      const seen = images.find((image) => image.offsetWidth) ?? images[0];
      dialog.querySelector("img")?.remove();
      dialog.append(Object.assign(new Image(), { src: seen.src, alt: seen.alt }));
      dialog.showModal();
    };
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "imsvd-enlarge", textContent: "⤢", onclick: enlarge });
    button.setAttribute("aria-label", "Enlarge the picture");
    images.forEach((image) => { image.onclick = enlarge; });
    figure.append(button);
  }

  // The search shows pieces of the pages' source, in which formulas are TeX.
  if (typeof Search === "undefined") return;
  const signs = { alpha: "α", beta: "β", lambda: "λ", tau: "τ", mu: "μ", sum: "Σ", cdot: "·", times: "×", le: "≤", ge: "≥",
    log: "log ", exp: "exp ", dots: "…", infty: "∞", to: "→", in: "∈" };
  const words = (tex) => tex
    .replace(/\\[()[\]]/g, "")
    .replace(/\\([A-Za-z]+) ?/g, (_, name) => signs[name] ?? "")
    .replace(/[\\{}^_&~]/g, "");
  const text = Search.htmlToText;
  Search.htmlToText = (source, anchor) => {
    const page = new DOMParser().parseFromString(source, "text/html");
    page.querySelectorAll("div.math").forEach((formula) => formula.replaceWith(" … "));
    page.querySelectorAll("span.math").forEach((formula) => formula.replaceWith(words(formula.textContent)));
    return text(page.documentElement.outerHTML, anchor);
  };
});
