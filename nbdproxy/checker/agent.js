// The checker guest's end: mounts what is at the start of /dev/vdb and tells what is there.
//
// Takes a JSON object a line from a virtio port and answers each with one that has the same number,
// and what the kernel has said since the answer before. Names are bytes; they travel as latin-1, a
// character a byte. Paths are those of the guest whose disk this is: a place says at which point of
// its tree the filesystem shows, with which of its directories (root), and which points below are
// covered by other filesystems. Links are followed by hand in that tree; what leads out of the
// filesystem fails with EXDEV.
'use strict';
const fs = require('fs');
const crypto = require('crypto');
const { spawnSync } = require('child_process');

const DISK = '/dev/vdb1'; // as long as the state: see attach.pl
const ROOT = '/mnt';
const LINKS_MAX = 40;
const BLOCK = 4096;
const CHUNK = 1 << 20;
const ZEROES = Buffer.alloc(BLOCK);
const buffer = Buffer.alloc(CHUNK);

const bytes = (text) => Buffer.from(text, 'latin1');
const text = (raw) => Buffer.from(raw).toString('latin1');
const ABSENT = new Set(['ENOENT', 'ENOTDIR', 'ELOOP', 'ENAMETOOLONG']);

let folders = new Set(); // ways that lead to a folder without links, in this mount

function run(program, ...words) {
  const done = spawnSync(program, words, { encoding: 'latin1', stdio: ['ignore', 'pipe', 'pipe'] });
  return { code: done.status === null ? -1 : done.status, said: (done.stdout || '') + (done.stderr || '') };
}

// What the kernel has said since it was asked last: a read gives one record, and the text of it
// stands behind the first semicolon.
const kmsg = fs.openSync('/dev/kmsg', fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);

function kernelSaid() {
  for (const said = []; ; ) {
    try {
      const count = fs.readSync(kmsg, buffer, 0, CHUNK, null);
      const record = buffer.latin1Slice(0, count).split('\n', 1)[0];
      said.push(record.slice(record.indexOf(';') + 1));
    } catch (error) {
      if (error.code === 'EAGAIN') return said;
      if (error.code !== 'EPIPE') throw error; // some was overwritten before it was read
    }
  }
}

function load(group) {
  return run('sh', '-c', `for m in $(cat /modules/${group}.order); do insmod /modules/$m.ko; done`);
}

// What attach.pl answers to a command: an errno.
const attachIn = fs.openSync('/attach.in', 'w'), attachOut = fs.openSync('/attach.out', 'r');

function attach(...words) {
  fs.writeSync(attachIn, words.join('\t') + '\n');
  const count = fs.readSync(attachOut, buffer, 0, CHUNK, null);
  if (count === 0) throw new Error('attach.pl ended');
  return Number(buffer.latin1Slice(0, count));
}

const loaded = new Set();
let daemon = null; // the program that serves what is mounted, if the kernel does not

// Tells the errno of mount(2), 0 if it is mounted; of a program the status and what it said.
function mount({ fs: kind, flags, options, length, load: wanted, program, probe }) {
  if (wanted && !loaded.has(kind)) {
    load(kind);
    loaded.add(kind);
  }
  folders = new Set();
  daemon = null;
  const code = attach('attach', length);
  if (code !== 0) throw new Error(`${DISK} cannot be made anew (errno ${code})`);
  if (!program) return { code: attach('mount', kind, flags, options), said: '' };
  const [first, ...rest] = probe;
  let done = first ? run('/tools/bin/' + first, ...rest, DISK) : { code: 0 };
  if (done.code === 0) done = run('/tools/bin/' + program, '-o', options, DISK, ROOT);
  if (done.code === 0) daemon = program;
  return done;
}

// Unmounts, and waits until whatever served it has let go of the disk: a cache of it would stay.
function umount() {
  const code = attach('umount');
  while (code === 0 && daemon && run('pidof', daemon).code === 0) spawnSync('sleep', ['0.01']);
  return { code };
}

// What btrfs-progs say of the default subvolume of a Btrfs, of all, and of the snapshots.
function subvolumes() {
  const ask = (...words) => run('/tools/bin/btrfs', 'subvolume', ...words, ROOT);
  return { first: ask('get-default'), all: ask('list'), snapshots: ask('list', '-s') };
}

// A daemon that died says nothing of the files, and neither does a fault of this program.
function mustBeServed(error) {
  if (!error.code || error.code === 'ENOTCONN' || error.code === 'ECONNABORTED') throw error;
}

const failed = (code) => Object.assign(new Error(), { code });
const names = (path) => path.split('/').filter((part) => part !== '' && part !== '.');

// Where something of a place, by its path from the mount point, is in this system.
const host = (place, path) => bytes(ROOT + place.root + path);

// The names of a guest's absolute path that are left below the mount point.
function below(place, path) {
  const parts = names(path);
  for (const name of names(place.point)) if (parts.shift() !== name) throw failed('EXDEV');
  return parts;
}

// Throws if a link is on the way to the directory that shows: it may lead out of the mount.
function mustBeStraight(place) {
  let here = '';
  for (const name of names(place.root)) {
    here += '/' + name;
    if (folders.has(here)) continue;
    if (fs.lstatSync(bytes(ROOT + here)).isSymbolicLink()) throw failed('EXDEV');
    folders.add(here);
  }
}

// Where a guest's absolute path leads, from the mount point; throws as the kernel does.
function resolve(place, path) {
  mustBeStraight(place);
  let parts = below(place, path), here = '', left = LINKS_MAX;
  while (parts.length) {
    const part = parts.shift();
    if (part === '..') {
      if (here === '' && place.point !== '') throw failed('EXDEV');
      here = here.slice(0, Math.max(here.lastIndexOf('/'), 0));
      continue;
    }
    const next = here + '/' + part;
    if (place.covered.includes(place.point + next)) throw failed('EXDEV');
    if (folders.has(place.root + next)) {
      here = next;
      continue;
    }
    const stat = fs.lstatSync(host(place, next));
    if (!stat.isSymbolicLink()) {
      if (stat.isDirectory()) folders.add(place.root + next);
      else if (parts.length) throw failed('ENOTDIR');
      here = next;
      continue;
    }
    if (left-- === 0) throw failed('ELOOP');
    const target = text(fs.readlinkSync(host(place, next), { encoding: 'buffer' }));
    parts = (target.startsWith('/') ? below(place, target) : names(target)).concat(parts);
    if (target.startsWith('/')) here = '';
  }
  return here;
}

// The same for a name that is not followed itself.
function resolveName(place, path) {
  const cut = path.lastIndexOf('/');
  const folder = resolve(place, path.slice(0, cut));
  const found = folder + path.slice(cut);
  if (place.covered.includes(place.point + found)) throw failed('EXDEV');
  return found;
}

// The digests of a file and what zeroes are in it, block by block.
function look(path, size, algorithms) {
  const hashes = {}; // earlier versions are known by their SHA-256, whatever a manifest has
  for (const name of new Set(['sha256', ...algorithms])) {
    hashes[name] = crypto.createHash(name === 'blake2b' ? 'blake2b512' : name);
  }
  const file = fs.openSync(path, 'r');
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

// What has more zeroes than these, or is larger than its disk, would take for ever.
function isEndless(stat, { limit, holes }) {
  return stat.size > limit || stat.size - stat.blocks * 512 > holes;
}

function describe(place, entry, limits) {
  try {
    if (entry.link) {
      const path = host(place, resolveName(place, entry.path));
      if (!fs.lstatSync(path).isSymbolicLink()) return { kind: 'other' };
      return { kind: 'link', target: text(fs.readlinkSync(path, { encoding: 'buffer' })) };
    }
    const path = host(place, resolve(place, entry.path));
    const stat = fs.lstatSync(path);
    if (!stat.isFile()) return { kind: 'other' };
    const found = { kind: 'file', size: stat.size, mode: stat.mode & 0o7777 };
    return isEndless(stat, limits) ? found : { ...found, ...look(path, stat.size, entry.algorithms) };
  } catch (error) {
    mustBeServed(error);
    return ABSENT.has(error.code) ? { kind: 'none' } : { kind: 'error', code: error.code };
  }
}

const manifests = new Map();

// Tells of each file of a manifest; those that are as expected are only counted off.
function judge({ manifest, place, ...limits }) {
  return {
    files: manifests.get(manifest).map((entry) => {
      const found = describe(place, entry, limits);
      const { algorithms, digest } = entry;
      const whole = found.digests && algorithms.some((name) => found.digests[name] === digest);
      return whole && entry.mode === null ? 1 : found;
    }),
  };
}

// What a file holds, or where a link points, in base64; null if there is none, or it is too long.
function read({ path, place, link, limit }) {
  try {
    const found = host(place, link ? resolveName(place, path) : resolve(place, path));
    const stat = fs.lstatSync(found);
    if (link && stat.isSymbolicLink()) {
      return { data: fs.readlinkSync(found, { encoding: 'buffer' }).toString('base64') };
    }
    if (!stat.isFile() || stat.size > limit) return { data: null };
    return { data: fs.readFileSync(found).toString('base64') };
  } catch (error) {
    mustBeServed(error);
    return { data: null };
  }
}

// Every regular file and link of a place below a folder, in no order, and what cannot be read. Each
// name is asked for itself: where folders do not tell types, one broken name would hide the others.
function walk({ under, place, digests, ...limits }) {
  const files = [], errors = [];
  const visit = (folder) => {
    let names;
    try {
      names = fs.readdirSync(host(place, folder), { encoding: 'buffer' });
    } catch (error) {
      mustBeServed(error);
      errors.push([place.point + folder, error.code]);
      return;
    }
    for (const name of names) {
      const below = folder + '/' + text(name), path = place.point + below;
      if (place.covered.includes(path)) continue;
      try {
        const at = host(place, below), stat = fs.lstatSync(at);
        if (stat.isDirectory()) {
          visit(below);
        } else if (stat.isSymbolicLink()) {
          files.push({ path, target: text(fs.readlinkSync(at, { encoding: 'buffer' })) });
        } else if (stat.isFile()) {
          const found = { path, size: stat.size, mode: stat.mode & 0o7777 };
          const isRead = digests && !isEndless(stat, limits);
          files.push(isRead ? { ...found, ...look(at, stat.size, []) } : found);
        }
      } catch (error) {
        mustBeServed(error);
        errors.push([path, error.code]);
      }
    }
  };
  try {
    mustBeStraight(place);
    const isAbove = (place.point + '/').startsWith(under === '/' ? '/' : under + '/');
    const top = isAbove ? '' : resolve(place, under);
    if (fs.lstatSync(host(place, top)).isDirectory()) visit(top);
  } catch (error) {
    mustBeServed(error);
    if (!ABSENT.has(error.code)) errors.push([under, error.code]);
  }
  return { files, errors };
}

// What stands at a path of a place, no link followed; a code if it cannot be told.
function seen(place, below) {
  try {
    const stat = fs.lstatSync(host(place, below), { bigint: true });
    const found = { path: place.point + below, mode: Number(stat.mode), size: String(stat.size) };
    const key = [String(stat.dev), String(stat.ino)];
    const target = stat.isSymbolicLink()
      ? text(fs.readlinkSync(host(place, below), { encoding: 'buffer' })) : null;
    return { ...found, mtime: String(stat.mtimeNs), key, target };
  } catch (error) {
    mustBeServed(error);
    return { path: place.point + below, code: error.code || String(error) };
  }
}

function find({ path, place }) {
  try {
    const top = names(path).length === names(place.point).length;
    return seen(place, top ? '' : resolveName(place, path));
  } catch (error) {
    mustBeServed(error);
    return { path, code: error.code || String(error) };
  }
}

// What is in a folder, in no order; `code` if names may be missing.
function list({ path, place }) {
  const folder = path.slice(place.point.length).replace(/\/$/, '');
  try {
    const raw = fs.readdirSync(host(place, folder), { encoding: 'buffer' });
    const below = raw.map((name) => folder + '/' + text(name));
    const mine = below.filter((one) => !place.covered.includes(place.point + one));
    return { found: mine.map((one) => seen(place, one)), code: null };
  } catch (error) {
    mustBeServed(error);
    return { found: [], code: error.code || String(error) };
  }
}

// Whether the first bytes of the buffer are all zero.
function isZero(length) {
  for (let b = 0; b < length; b += BLOCK) {
    const end = Math.min(b + BLOCK, length);
    if (buffer.compare(ZEROES, 0, end - b, b, end) !== 0) return false;
  }
  return true;
}

// Some bytes of a file, in base64; '' if they are zeroes.
function piece({ path, place, offset, length }) {
  try {
    const file = fs.openSync(host(place, path.slice(place.point.length)), 'r');
    try {
      let got = 0;
      while (got < length) {
        const count = fs.readSync(file, buffer, got, length - got, offset + got);
        if (count === 0) break;
        got += count;
      }
      return { got, data: isZero(got) ? '' : buffer.toString('base64', 0, got) };
    } finally {
      fs.closeSync(file);
    }
  } catch (error) {
    mustBeServed(error);
    return { code: error.code || String(error) };
  }
}

const COMMANDS = {
  hello: () => ({ ok: true }),
  mount,
  umount,
  manifest: ({ manifest, entries }) => {
    manifests.set(manifest, entries);
    return { ok: true };
  },
  judge,
  walk,
  read,
  find,
  list,
  piece,
  fsck: ({ argv }) => run(...argv, DISK),
  subvolumes,
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
      const answer = {};
      try {
        const command = JSON.parse(line);
        answer.number = command.number;
        answer.found = COMMANDS[command.do](command);
      } catch (error) {
        answer.failed = String(error);
      }
      send(port, { ...answer, log: kernelSaid() });
    }
    if (rest.length) pending.push(rest);
  }
}

main();
