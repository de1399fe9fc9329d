// Puts the live view of each explorer and prediction in the place of what stands there first. The widgets are ipywidgets' own; here is
// only what holds them together on a page without a kernel: which widget is which, and a view for each that is shown.
(() => {
  const widgets = window.courseWidgets;
  const stored = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
  if (!widgets || !stored) return;
  const states = JSON.parse(stored.textContent);

  const manager = {
    models: {},
    has_model: (identity) => identity in states,
    get_model(identity) {
      this.models[identity] ??= this.make_model(identity);
      return this.models[identity];
    },
    async make_model(identity) {
      const { model_name, state } = states[identity];
      const Model = widgets[model_name];
      const attributes = await Model._deserialize_state(state, this);
      const model = new Model(attributes, { widget_manager: this, model_id: identity });
      model.name = model_name;
      return model;
    },
    create_view(model, options = {}) {
      const made = model.state_change.then(async () => {
        const View = widgets[model.get("_view_name")];
        const view = new View({ model, options });
        view.listenTo(model, "destroy", view.remove);
        await view.render();
        view.once("remove", () => delete model.views[view.cid]);
        return view;
      });
      model.state_change = made;
      if (model.views) made.then((view) => { model.views[view.cid] = made; });
      return made;
    },
    callbacks: () => ({}),
    resolve_url: async (url) => url,
    // Words in widgets are plain text; without this, ipywidgets would call MathJax 2, which is not there.
    _rendermime: { latexTypesetter: { typeset() {} } },
    inline_sanitize: (text) => text.replace(/[<>&]/g, (letter) => `&#${letter.charCodeAt(0)};`),
  };

  // A screen reader says a slider's name and the value beside it, not the position.
  function name_slider(slider) {
    const handle = slider.querySelector(".noUi-handle");
    const label = slider.querySelector(".widget-label");
    const readout = slider.querySelector(".widget-readout");
    const tell = () => {
      if (handle.getAttribute("aria-valuetext") !== readout.textContent) {
        handle.setAttribute("aria-valuetext", readout.textContent);
      }
    };
    handle.setAttribute("aria-label", label.textContent);
    new MutationObserver(tell).observe(handle, { attributes: true, attributeFilter: ["aria-valuetext"] });
    new MutationObserver(tell).observe(readout, { childList: true, characterData: true, subtree: true });
    tell();
  }

  // The live view is made out of sight, and takes the place of the start in one go: nothing on the page moves.
  async function enliven(place) {
    const start = place.querySelector(".explorer-start, .prediction-start");
    const sliders = start.querySelectorAll(".explorer-row").length;
    const buttons = start.querySelectorAll("li").length;
    const view = await manager.create_view(await manager.get_model(place.dataset.model));
    const live = document.createElement("div");
    live.className = "live";
    const ready = new Promise((resolve) => {
      const look = () => {
        const image = live.querySelector("img");
        const there = live.querySelectorAll(".noUi-handle").length === sliders
          && live.querySelectorAll("button").length === buttons;
        if (there && image) image.decode().then(resolve);
        else if (there && buttons) resolve();
        else requestAnimationFrame(look);
      };
      look();
    });
    view.luminoWidget.processMessage({ type: "before-attach" });
    place.append(live);
    live.append(view.el);
    view.luminoWidget.processMessage({ type: "after-attach" });
    await ready;
    live.querySelectorAll(".widget-slider").forEach(name_slider);
    start.remove();
    place.classList.add("alive");
  }

  (async () => {
    const links = Object.keys(states).filter((identity) => /LinkModel$/.test(states[identity].model_name));
    await Promise.all(links.map((identity) => manager.get_model(identity)));
    for (const place of document.querySelectorAll("[data-model]")) await enliven(place);
  })();
})();
