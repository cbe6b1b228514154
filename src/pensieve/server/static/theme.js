/* Runs before the first paint, so that a chosen theme never flashes the other one. Knows nothing else. */
"use strict";
try {
  const theme = localStorage.getItem("pensieve.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is blocked: the system's colours it is
}
