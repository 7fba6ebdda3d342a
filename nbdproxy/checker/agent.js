// The checker guest's end: mounts what is on /dev/vdb and tells what is there.
//
// Takes a JSON object a line from a virtio port and answers each with one. Names are bytes; they
// travel as latin-1, a character a byte. Links are followed by hand, as an absolute one begins at
// the mounted filesystem's root and not at the guest's.
'use strict';
const fs = require('fs');
const crypto = require('crypto');
const { spawnSync } = require('child_process');

const DISK = '/dev/vdb';
const ROOT = '/mnt';
const LINKS_MAX = 40;
const BLOCK = 4096;
const CHUNK = 1 << 20;
const ZEROES = Buffer.alloc(BLOCK);
const buffer = Buffer.alloc(CHUNK);

const bytes = (text) => Buffer.from(text, 'latin1');
const text = (raw) => Buffer.from(raw).toString('latin1');
const ABSENT = new Set(['ENOENT', 'ENOTDIR', 'ELOOP', 'ENAMETOOLONG']);

let folders = new Map(); // what each way to a folder leads to, in this mount

function run(program, ...words) {
  const done = spawnSync(program, words, { encoding: 'latin1', stdio: ['ignore', 'pipe', 'pipe'] });
  return { code: done.status === null ? -1 : done.status, said: (done.stdout || '') + (done.stderr || '') };
}

function load(group) {
  return run('sh', '-c', `for m in $(cat /modules/${group}.order); do insmod /modules/$m.ko; done`);
}

const loaded = new Set();
let daemon = null; // the program that serves what is mounted, if the kernel does not

function mount({ fs: kind, options, load: wanted, program, probe }) {
  if (wanted && !loaded.has(kind)) {
    load(kind);
    loaded.add(kind);
  }
  folders = new Map();
  run('dmesg', '-c');
  const command = program ? ['/tools/bin/' + program] : ['mount', '-t', kind];
  const [first, ...words] = probe;
  let done = first ? run('/tools/bin/' + first, ...words, DISK) : { code: 0 };
  if (done.code === 0) done = run(...command, '-o', options, DISK, ROOT);
  daemon = done.code === 0 ? program : null;
  return { ...done, log: done.code === 0 || program ? '' : run('dmesg', '-c').said };
}

// Unmounts, and waits until whatever served it has let go of the disk: a cache of it would stay.
function umount() {
  const ok = run('umount', ROOT).code === 0;
  while (ok && daemon && run('pidof', daemon).code === 0) spawnSync('sleep', ['0.01']);
  return { ok };
}

// A daemon that died says nothing of the files.
function mustBeServed(error) {
  if (error.code === 'ENOTCONN' || error.code === 'ECONNABORTED') throw error;
}

// Where a path leads below ROOT, every link followed; throws as the kernel does.
function resolve(path, links) {
  const parts = path.split('/').filter((part) => part !== '' && part !== '.');
  let here = '';
  for (let i = 0; i < parts.length; i++) {
    if (parts[i] === '..') {
      here = here.slice(0, here.lastIndexOf('/'));
      continue;
    }
    const next = here + '/' + parts[i];
    const known = folders.get(next);
    if (known !== undefined) {
      here = known;
      continue;
    }
    const stat = fs.lstatSync(bytes(ROOT + next));
    if (!stat.isSymbolicLink()) {
      if (stat.isDirectory()) folders.set(next, next);
      else if (i < parts.length - 1) throw Object.assign(new Error(), { code: 'ENOTDIR' });
      here = next;
      continue;
    }
    if (links.left-- === 0) throw Object.assign(new Error(), { code: 'ELOOP' });
    const target = text(fs.readlinkSync(bytes(ROOT + next), { encoding: 'buffer' }));
    const rest = parts.slice(i + 1).join('/');
    return resolve((target.startsWith('/') ? '' : here + '/') + target + '/' + rest, links);
  }
  return here;
}

// The digests of a file and what zeroes are in it, block by block.
function look(place, size, algorithm) {
  const hashes = {}; // earlier versions are known by their SHA-256, whatever a manifest has
  for (const name of new Set(['sha256', algorithm])) {
    hashes[name] = crypto.createHash(name === 'blake2b' ? 'blake2b512' : name);
  }
  const file = fs.openSync(bytes(ROOT + place), 'r');
  let allZero = true, zeroBlock = false, at = 0;
  try {
    while (at < size) {
      const want = Math.min(CHUNK, size - at);
      let got = 0;
      while (got < want) {
        const count = fs.readSync(file, buffer, got, want - got, at + got);
        if (count === 0) break;
        got += count;
      }
      if (got === 0) break;
      for (const hash of Object.values(hashes)) hash.update(buffer.subarray(0, got));
      for (let b = 0; b < got; b += BLOCK) {
        const end = Math.min(b + BLOCK, got);
        if (buffer.compare(ZEROES, 0, end - b, b, end) === 0) zeroBlock = true;
        else allZero = false;
      }
      at += got;
    }
  } finally {
    fs.closeSync(file);
  }
  const digests = {};
  for (const name in hashes) digests[name] = hashes[name].digest('hex');
  return { size, digests, allZero, zeroBlock };
}

function describe(entry, limit) {
  const isLink = entry.link;
  try {
    const cut = entry.path.lastIndexOf('/');
    const folder = resolve(entry.path.slice(0, cut), { left: LINKS_MAX });
    const name = entry.path.slice(cut + 1);
    if (isLink) {
      const stat = fs.lstatSync(bytes(ROOT + folder + '/' + name));
      if (!stat.isSymbolicLink()) return { kind: 'other' };
      const target = fs.readlinkSync(bytes(ROOT + folder + '/' + name), { encoding: 'buffer' });
      return { kind: 'link', target: text(target) };
    }
    const place = resolve(entry.path, { left: LINKS_MAX });
    const stat = fs.lstatSync(bytes(ROOT + place));
    if (!stat.isFile()) return { kind: 'other' };
    const found = { kind: 'file', size: stat.size, mode: stat.mode & 0o7777 };
    // What is sparse and larger than its disk would take for ever.
    return stat.size > limit ? found : { ...found, ...look(place, stat.size, entry.algorithm) };
  } catch (error) {
    mustBeServed(error);
    return ABSENT.has(error.code) ? { kind: 'none' } : { kind: 'error', code: error.code || String(error) };
  }
}

const manifests = new Map();

// Tells of each file of a manifest; those that are as expected are only counted off.
function judge({ manifest, limit }) {
  return {
    files: manifests.get(manifest).map((entry) => {
      const found = describe(entry, limit);
      const whole = found.digests && found.digests[entry.algorithm] === entry.digest;
      return whole && entry.mode === null ? 1 : found;
    }),
  };
}

// What a file holds, or where a link points, in base64; null if there is none, or it is too long.
function read({ path, link, limit }) {
  try {
    const cut = path.lastIndexOf('/');
    const folder = resolve(path.slice(0, cut), { left: LINKS_MAX });
    const place = link ? folder + path.slice(cut) : resolve(path, { left: LINKS_MAX });
    const stat = fs.lstatSync(bytes(ROOT + place));
    if (link && stat.isSymbolicLink()) {
      const target = fs.readlinkSync(bytes(ROOT + place), { encoding: 'buffer' });
      return { data: target.toString('base64') };
    }
    if (!stat.isFile() || stat.size > limit) return { data: null };
    return { data: fs.readFileSync(bytes(ROOT + place)).toString('base64') };
  } catch (error) {
    mustBeServed(error);
    return { data: null };
  }
}

// Every regular file and link below a folder, in no order.
function walk({ under, digests, limit }) {
  const files = [], errors = [];
  const visit = (place) => {
    let names;
    try {
      names = fs.readdirSync(bytes(ROOT + place), { encoding: 'buffer', withFileTypes: true });
    } catch (error) {
      mustBeServed(error);
      errors.push([place, error.code]);
      return;
    }
    for (const entry of names) {
      const path = place + '/' + text(entry.name);
      if (entry.isDirectory()) {
        visit(path);
        continue;
      }
      try {
        if (entry.isSymbolicLink()) {
          const target = fs.readlinkSync(bytes(ROOT + path), { encoding: 'buffer' });
          files.push({ path, target: text(target) });
        } else if (entry.isFile()) {
          const stat = fs.lstatSync(bytes(ROOT + path));
          const found = { path, size: stat.size, mode: stat.mode & 0o7777 };
          files.push(digests && stat.size <= limit ? { ...found, ...look(path, stat.size, 'sha256') } : found);
        }
      } catch (error) {
        mustBeServed(error);
        errors.push([path, error.code]);
      }
    }
  };
  try {
    const top = resolve(under, { left: LINKS_MAX });
    if (fs.lstatSync(bytes(ROOT + top)).isDirectory()) visit(top);
  } catch (error) {
    if (!ABSENT.has(error.code)) errors.push([under, error.code]);
  }
  return { files, errors };
}

const COMMANDS = {
  hello: () => ({ ok: true }),
  mount,
  umount,
  manifest: ({ number, entries }) => {
    manifests.set(number, entries);
    return { ok: true };
  },
  judge,
  walk,
  read,
  fsck: ({ argv }) => run(...argv, DISK),
};

function findPort(name) {
  for (;;) {
    for (const port of fs.readdirSync('/sys/class/virtio-ports')) {
      const said = fs.readFileSync(`/sys/class/virtio-ports/${port}/name`, 'utf8').trim();
      if (said === name) return fs.openSync(`/dev/${port}`, 'r+');
    }
    spawnSync('sleep', ['0.05']);
  }
}

function send(port, answer) {
  const data = Buffer.from(JSON.stringify(answer) + '\n');
  for (let at = 0; at < data.length; ) at += fs.writeSync(port, data, at);
}

function main() {
  // What the kernel says on the console of thousands of broken states would fill the host's pipe.
  run('dmesg', '-n', '1');
  const port = findPort('checker');
  let pending = [], spoken = false;
  for (;;) {
    const count = fs.readSync(port, buffer, 0, CHUNK, null);
    if (count === 0 && spoken) return; // the host is gone, and so is the guest
    if (count === 0) { // the host is not there yet
      spawnSync('sleep', ['0.05']);
      continue;
    }
    spoken = true;
    let rest = Buffer.from(buffer.subarray(0, count));
    for (let end; (end = rest.indexOf(10)) >= 0; rest = rest.subarray(end + 1)) {
      const line = Buffer.concat([...pending, rest.subarray(0, end)]).toString();
      pending = [];
      let answer;
      try {
        const command = JSON.parse(line);
        answer = COMMANDS[command.do](command);
      } catch (error) {
        answer = { failed: String(error) };
      }
      send(port, answer);
    }
    if (rest.length) pending.push(rest);
  }
}

main();
