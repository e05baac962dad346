// Light, dark, or what the system has. The choice stays with the tab.

const NAMES = ["system", "light", "dark"];
const LISTENERS = new Set();
let chosen = "system";

export function onThemeChange(listener) {
  LISTENERS.add(listener);
}

export function startTheme(button) {
  const apply = () => {
    if (chosen === "system") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", chosen);
    button.textContent = `Theme: ${chosen}`;
    for (const listener of LISTENERS) listener();
  };
  button.addEventListener("click", () => {
    chosen = NAMES[(NAMES.indexOf(chosen) + 1) % NAMES.length];
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}
