// Formulas of the page at hand; arithmatex marks them.
document.addEventListener("DOMContentLoaded", () =>
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  }),
);

// What the theme leaves undone for readers with a keyboard or a screen reader. It wraps tables when they come into view
// and adds buttons to code, so this looks again after every change.
function mend() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, .arithmatex")) {
    const scrolls = box.scrollWidth > box.clientWidth;
    if (scrolls && !box.hasAttribute("tabindex")) {
      box.tabIndex = 0;
      box.dataset.mended = "";
    } else if (!scrolls && "mended" in box.dataset) {
      box.removeAttribute("tabindex");
      delete box.dataset.mended;
    }
  }
  // Landmarks are for a page's parts: neither a button for copying is one, nor a level of a table of contents.
  for (const nav of document.querySelectorAll(".md-code__nav, .md-nav--secondary .md-nav")) {
    nav.setAttribute("role", "none");
    nav.removeAttribute("aria-label");
  }
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  // A figure opens by itself: on a phone its letters are small.
  for (const image of document.querySelectorAll(".md-typeset img")) {
    if (!image.closest("a")) {
      const link = Object.assign(document.createElement("a"), { href: image.src });
      image.replaceWith(link);
      link.append(image);
    }
  }
  for (const cell of document.querySelectorAll(".md-typeset th:empty")) {
    cell.replaceWith(Object.assign(document.createElement("td"), { className: "corner" }));
  }
}
document.addEventListener("DOMContentLoaded", () => {
  mend();
  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      mend();
    });
  };
  new MutationObserver(later).observe(document.body, { childList: true, subtree: true });
  window.addEventListener("resize", later);
  document.fonts.addEventListener("loadingdone", later); // formulas change their width
});
