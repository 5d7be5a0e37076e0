/**
 * Colors of norms, of special cells and of curves. They are the same as in gradwatch's own plots.
 *
 * References:
 *   Okabe, Ito: Color Universal Design. 2008. Nuñez, Anderton, Renslow: Optimizing colormaps with
 *   consideration for color vision deficiency. PLOS ONE 13(7), 2018.
 */

// 33 evenly spaced colors of each matplotlib map. Linear interpolation between them is accurate
// enough.
const VIRIDIS =
  "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e" +
  "23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23" +
  "d8e219ece51bfde725";
const BROWN_GREEN =
  "003c3000493e01564d01645b0e726a1f827a2f918944a2995bb3a873c3b88ad1c6a0dad1b6e3ddcbebe6d9eeeb" +
  "e7f2f0f5f5f4f5f1e4f6edd5f6e9c5f0deb0e8d29ae1c684d8b46ccea053c48b3ab77928a76a1d975b12874e0a" +
  "754308633906543005";

/** Colors of special cells. The color maps do not contain them, and each has its own lightness. */
export const SPECIAL = { bad: "#ff33ff", badDark: "#a800b8", zero: "#000000", zeroLine: "#8d96a3" };

/**
 * Packs a color as a pixel of ImageData.
 *
 * @param {string} hex Six hexadecimal digits after an optional `#`.
 * @returns {number}
 */
export function pixel(hex) {
  const rgb = parseInt(hex.replace("#", ""), 16);
  const [r, g, b] = [rgb >> 16, (rgb >> 8) & 255, rgb & 255];
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/**
 * Returns the colors of norms.
 *
 * @param {boolean} relative Whether the norms are divided by the typical norm of their row.
 * @returns {Uint32Array} 256 pixels, from low to high.
 */
export function colourMap(relative) {
  const text = relative ? BROWN_GREEN : VIRIDIS;
  const stops = Array.from({ length: 33 }, (_, i) => parseInt(text.slice(6 * i, 6 * i + 6), 16));
  const pixels = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * 32;
    const at = Math.min(31, Math.floor(place));
    const channel = (shift) => {
      const [a, b] = [(stops[at] >> shift) & 255, (stops[at + 1] >> shift) & 255];
      return Math.round(a + (b - a) * (place - at));
    };
    pixels[i] = ((255 << 24) | (channel(0) << 16) | (channel(8) << 8) | channel(16)) >>> 0;
  }
  return pixels;
}

/**
 * Reads the colors and fonts that the canvases need from the style sheet.
 *
 * @returns {Object<string, string>} Colors and fonts by name.
 */
export function readTheme() {
  const style = getComputedStyle(document.body);
  const names = ["text", "muted", "grid", "tick", "surface", "absent", "absent-line", "norm"];
  const theme = {};
  for (const name of [...names, "clip", "threshold", "bad", "skipped", "other"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
  theme.family = style.fontFamily;
  theme.small = `11px ${theme.family}`;
  return theme;
}
