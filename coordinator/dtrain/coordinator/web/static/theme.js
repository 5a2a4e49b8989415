// Before anything is drawn, or a dark page would flash white.
"use strict";
try {
  const chosen = localStorage.getItem("dtrain-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be forbidden: then the system's choice holds.
}
