// A picture with a cursor: it follows the pointer and the arrow keys; a click holds it, another frees it.

const STEPS = 50; // of an arrow key, from one edge of the axes to the other
const ARROWS = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowDown: [0, -1],
  ArrowUp: [0, 1],
};

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

function render({ model, el }) {
  const [left, bottom, width, height] = model.get("box"); // of the axes, as shares of the picture
  const [xMin, xMax, yMin, yMax] = model.get("extent"); // latent coordinates at the edges of the axes

  const map = document.createElement("div");
  map.className = "vae-map";
  map.tabIndex = 0;
  map.setAttribute("role", "application");
  map.setAttribute("aria-label", "latent map: arrow keys move the cursor");
  map.innerHTML = model.get("picture");
  const cursor = document.createElement("span");
  cursor.className = "vae-at";
  map.append(cursor);
  el.replaceChildren(map);

  let isHeld = false;

  function draw() {
    const [x, y] = model.get("at");
    cursor.style.left = 100 * (left + (width * (x - xMin)) / (xMax - xMin)) + "%";
    cursor.style.bottom = 100 * (bottom + (height * (y - yMin)) / (yMax - yMin)) + "%";
  }

  function moveTo(x, y) {
    model.set("at", [clamp(x, xMin, xMax), clamp(y, yMin, yMax)]);
    model.save_changes();
  }

  map.onpointermove = (event) => {
    const picture = map.getBoundingClientRect();
    const across = ((event.clientX - picture.left) / picture.width - left) / width;
    const up = (1 - (event.clientY - picture.top) / picture.height - bottom) / height;
    const isInside = across >= 0 && across <= 1 && up >= 0 && up <= 1;
    if (!isHeld && isInside) {
      moveTo(xMin + across * (xMax - xMin), yMin + up * (yMax - yMin));
    }
  };

  map.onclick = () => {
    isHeld = !isHeld;
    cursor.classList.toggle("vae-held", isHeld);
  };

  map.onkeydown = (event) => {
    const direction = ARROWS[event.key];
    if (!direction) return;
    event.preventDefault();
    event.stopPropagation();
    const [x, y] = model.get("at");
    moveTo(x + (direction[0] * (xMax - xMin)) / STEPS, y + (direction[1] * (yMax - yMin)) / STEPS);
  };

  model.on("change:at", draw);
  draw();
}

export default { render };
