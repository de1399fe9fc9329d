// What every page needs for those who use a keyboard or a screen reader: code and tables that are wider than the page
// can be scrolled by keyboard, and the page's two side columns have names.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "Chapters");
  document.querySelector(".toc-drawer")?.setAttribute("aria-label", "On this page");
  const look = () => {
    for (const wide of document.querySelectorAll("article pre, article .table-wrapper")) {
      if (wide.scrollWidth > wide.clientWidth) wide.setAttribute("tabindex", "0");
      else wide.removeAttribute("tabindex");
    }
  };
  look();
  window.addEventListener("resize", look);
});
