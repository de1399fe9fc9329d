// ipywidgets' own widgets come in a file made for the classic notebook (the package widgetsnbextension, which is
// always of the same version as ipywidgets). This stands in for that notebook while the file is read, no longer:
// it takes the widgets that the file defines and answers everything else with nothing.
(() => {
  const nothing = () => {};
  const before = { define: window.define, requirejs: window.requirejs, Jupyter: window.Jupyter };
  const notebook = { container: { on: nothing }, keyboard_manager: { actions: { register: nothing } } };
  const answers = {
    "base/js/namespace": { version: "6.5.0", notebook },
    "base/js/events": { on: nothing },
    "notebook/js/outputarea": { OutputArea: { prototype: { register_mime_type: nothing } } },
  };
  window.Jupyter = answers["base/js/namespace"];
  window.requirejs = (names, use) => use(...names.map((name) => answers[name]));
  window.requirejs.config = nothing;
  window.define = (names, make) => {
    const widgets = make({ uri: document.currentScript.src });
    widgets.load_ipython_extension(); // adds the style sheets
    Object.assign(window, before);
    window.courseWidgets = widgets;
  };
})();
