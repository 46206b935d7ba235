"use strict";

const plots = JSON.parse(document.getElementById("plots").textContent);
const templates = JSON.parse(document.getElementById("templates").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function draw() {
  const template = templates[dark.matches ? "dark" : "light"];
  for (const [name, plot] of Object.entries(plots)) {
    const layout = { ...plot.layout, template };
    Plotly.react(name, plot.data, layout, { responsive: true, displayModeBar: false });
  }
}

function colour() {
  const chosen = document.getElementById("colouring").value;
  document.getElementById("answers").dataset.colour = chosen;
  for (const scale of document.querySelectorAll(".scale")) scale.hidden = scale.dataset.colour !== chosen;
}

draw();
dark.addEventListener("change", draw);
if (document.getElementById("colouring")) {
  document.getElementById("colouring").addEventListener("change", colour);
  colour();
}
