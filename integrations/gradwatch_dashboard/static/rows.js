/** Rows: a flat list of the parameters, or a tree of modules made from their dotted names. */

/**
 * A tree opens to the deepest level with at most this many rows. If that level has fewer than `FEW`
 * rows, up to `MANY` rows of the next level are accepted.
 */
export const READABLE = 60;
const FEW = 12;
const MANY = 400;
/** Names with more parts are not realistic; the rest of such a name stays in one part. */
const DEEPEST = 40;

/**
 * A module or a parameter.
 *
 * @typedef {Object} Node
 * @property {string} key Unique: `m:` and a path, or `p:` and a name.
 * @property {string} name Full dotted name.
 * @property {string} label The text of its row; in a tree only the part below its parent.
 * @property {number} depth Number of ancestors that have a row.
 * @property {number} leaf Index of the parameter; -1 for a module.
 * @property {number[]} leaves Indices of the parameters in it.
 * @property {Node[]} children
 * @property {Node|null} parent
 */

/**
 * Lists parameters as rows.
 *
 * @param {string[]} names
 * @param {number[]} kept Indices of the names to list.
 * @returns {Node[]}
 */
export function flatRows(names, kept) {
  return kept.map((leaf) => node(`p:${names[leaf]}`, names[leaf], names[leaf], null, leaf));
}

/**
 * Builds the tree of dotted names. A module with a single child is merged with it.
 *
 * @param {string[]} names
 * @param {number[]} kept Indices of the names to use.
 * @returns {Node} Its root, which has no row.
 */
export function moduleTree(names, kept) {
  const root = node("m:", "", "", null, -1);
  const modules = new Map([["", root]]);
  for (const leaf of kept) {
    const parts = partsOf(names[leaf]);
    let above = root;
    above.leaves.push(leaf);
    for (let i = 1; i < parts.length; i++) {
      const path = parts.slice(0, i).join(".");
      let module = modules.get(`${i}:${path}`);
      if (!module) {
        module = node(`m:${path}`, path, parts[i - 1], above, -1);
        modules.set(`${i}:${path}`, module);
        above.children.push(module);
      }
      module.leaves.push(leaf);
      above = module;
    }
    above.children.push(node(`p:${names[leaf]}`, names[leaf], parts.at(-1), above, leaf));
  }
  root.children = root.children.map((child) => joined(child, root, 0));
  return root;
}

/**
 * Lists the rows of a tree, with the children of open modules only.
 *
 * @param {Node} root
 * @param {Set<string>} open Keys of the open modules.
 * @returns {Node[]}
 */
export function openRows(root, open) {
  const rows = [];
  const add = (child) => {
    rows.push(child);
    if (child.leaf < 0 && open.has(child.key)) child.children.forEach(add);
  };
  root.children.forEach(add);
  return rows;
}

/**
 * Opens a tree as deep as its rows can be read at a glance; see `READABLE`.
 *
 * @param {Node} root
 * @returns {Set<string>} Keys of the modules to open.
 */
export function readableDepth(root) {
  let open = new Set();
  for (let depth = 0; ; depth++) {
    const deeper = new Set(open);
    for (const module of modulesOf(root)) if (module.depth === depth) deeper.add(module.key);
    const most = openRows(root, open).length < FEW ? MANY : READABLE;
    if (deeper.size === open.size || openRows(root, deeper).length > most) return open;
    open = deeper;
  }
}

/**
 * Lists the modules of a tree.
 *
 * @param {Node} root
 * @returns {Node[]} Parents before their children.
 */
export function modulesOf(root) {
  const found = [];
  const visit = (module) => {
    for (const child of module.children) {
      if (child.leaf >= 0) continue;
      found.push(child);
      visit(child);
    }
  };
  visit(root);
  return found;
}

/**
 * Lists the modules that contain a parameter.
 *
 * @param {Node} root
 * @param {number} leaf
 * @returns {string[]} Keys.
 */
export function around(root, leaf) {
  return modulesOf(root)
    .filter((module) => module.leaves.includes(leaf))
    .map((module) => module.key);
}

function partsOf(name) {
  const parts = name.split(".");
  if (parts.length <= DEEPEST) return parts;
  return [...parts.slice(0, DEEPEST - 1), parts.slice(DEEPEST - 1).join(".")];
}

function node(key, name, label, parent, leaf) {
  const leaves = leaf < 0 ? [] : [leaf];
  return { key, name, label, depth: 0, leaf, leaves, children: [], parent };
}

function joined(child, parent, depth) {
  let below = child;
  let label = child.label;
  while (below.leaf < 0 && below.children.length === 1) {
    below = below.children[0];
    label += `.${below.label}`;
  }
  below.label = label;
  below.parent = parent;
  below.depth = depth;
  below.children = below.children.map((grandchild) => joined(grandchild, below, depth + 1));
  return below;
}
