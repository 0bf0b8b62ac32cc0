// A button on each block of code that copies it: of a console session the commands alone.
document.addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll("div.highlight")) {
    const kind = block.parentElement.className;
    if (!navigator.clipboard || !/highlight-(python|bash|console|yaml)/.test(kind)) continue;
    const button = document.createElement("button");
    button.className = "copy";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      let text = block.querySelector("pre").textContent;
      if (kind.includes("console")) {
        const commands = text.split("\n").filter((line) => line.startsWith("$ "));
        text = commands.map((line) => line.slice(2)).join("\n") + "\n";
      }
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
});
